"""The projector's weights are handed out only where they say all there is to say."""

import pytest
import torch
from tests.tiny import FAMILIES, build
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear, rms_norm

from vispress.adapters.base import find_adapter

PLAIN = ("llava", "llava_siglip", "llava_next", "llava_onevision")


def adapter_of(family):
    return find_adapter(build(family, dtype=torch.float32))


def compute_the_same(adapter):
    """Whether the weights, put together by hand, give what the projector gives."""
    torch.manual_seed(0)
    for weight in adapter.projector.parameters():
        nn.init.normal_(weight, std=0.3)
    mlp = adapter.two_layer()
    x = torch.randn(2, 5, mlp.w1.shape[1])
    before = x
    if (norm := mlp.norm) is not None:
        before = x.unflatten(-1, (norm.patches, -1))
        if norm.layer:
            before = layer_norm(before, norm.weight.shape, norm.weight, norm.bias, norm.eps)
        else:
            before = rms_norm(before, norm.weight.shape, norm.weight, norm.eps)
        before = before.flatten(-2)
    approximate = "tanh" if mlp.activation == "gelu_tanh" else "none"
    out = linear(gelu(linear(before, mlp.w1, mlp.b1), approximate=approximate), mlp.w2, mlp.b2)
    torch.testing.assert_close(adapter.project(adapter.projector, x), out)
    return mlp


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_compute_what_the_projector_computes(family):
    mlp = compute_the_same(adapter_of(family))
    assert (mlp.norm is None) == (family in PLAIN)
    there = mlp.to(torch.device("meta"))
    assert there.w2.is_meta
    assert there.norm is None or there.norm.weight.is_meta


def test_a_norm_behind_the_shuffle_takes_the_patches_together():
    adapter = adapter_of("qwen3_vl")
    adapter.base.visual.merger = adapter.base.visual.deepstack_merger_list[0]
    norm = compute_the_same(adapter).norm
    assert (norm.patches, len(norm.weight)) == (1, adapter.projector.hidden_size)


class Wider(nn.Linear):
    """What LoRA and quantisation put in the place of a linear layer."""


def wrap(projector):
    projector.linear_1 = Wider(8, 8)


def change_output(projector):
    projector.register_forward_hook(lambda module, args, out: 2 * out)


def change_input(projector):
    projector.linear_2.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def shadow(projector):
    projector.forward = lambda x: x


def offload(projector):
    projector.linear_1.to("meta")


def other_activation(projector):
    projector.act = nn.ReLU()


def derive(projector):
    projector.__class__ = type("OwnProjector", (type(projector),), {})


@pytest.mark.parametrize(
    "change",
    [wrap, change_output, change_input, shadow, offload, other_activation, derive],
    ids=lambda change: change.__name__,
)
def test_a_changed_projector_has_no_two_layers(change):
    adapter = adapter_of("llava")
    assert adapter.two_layer() is not None
    change(adapter.projector)
    assert adapter.two_layer() is None


def norm_of(adapter):
    merger = adapter.projector
    return next(m for name, m in merger.named_children() if name in ("ln_q", "norm", "layer_norm"))


def hook_norm(adapter):
    norm_of(adapter).register_forward_hook(lambda module, args, out: 2 * out)


def other_norm(adapter):
    (name,) = (name for name, m in adapter.projector.named_children() if m is norm_of(adapter))
    setattr(adapter.projector, name, nn.GroupNorm(2, 32))


def hook_activation(adapter):
    act = next(m for m in adapter.projector.modules() if "GELU" in type(m).__name__)
    act.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def derive_merger(adapter):
    derive(adapter.projector)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in PLAIN])
@pytest.mark.parametrize(
    "change", [hook_norm, other_norm, hook_activation, derive_merger], ids=lambda c: c.__name__
)
def test_a_changed_merger_has_no_two_layers(change, family):
    adapter = adapter_of(family)
    assert adapter.two_layer() is not None
    change(adapter)
    assert adapter.two_layer() is None
