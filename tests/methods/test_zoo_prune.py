"""ZOO-Prune: sensitivity and selection, by hand."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, map_tensors, only
from tests.methods.test_divprune import GOLDEN
from torch.nn import functional as F

from vispress.bench.timing.memory import LiveBytes
from vispress.errors import ConfigError
from vispress.methods import ZOOPrune
from vispress.methods._parts.scoring.sensitivity import of_any_projector, sensitivity
from vispress.methods.zoo_prune import sads_select
from vispress.types import PatchNorm, TwoLayer
from vispress_kernels.maxmin_select import maxmin_select


def directions_of(m, width, seed=0):
    drawn = torch.randn(m, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=1)


def test_worked_example():
    # cosines to token 0 are 1 - (0, .05, .8, .9)
    cosine = torch.tensor([1.0, 0.95, 0.2, 0.1])
    x = torch.stack([cosine, (1 - cosine**2).sqrt()], dim=1)[None]
    weight = torch.tensor([[1.0, 0.9, 0.3, 0.0]])
    assert maxmin_select(x, 2, weight=weight).tolist() == [[0, 2]]


def test_golden_vector():
    weight = torch.tensor([[0.2, 1, 0.3, 0.9, 0.5, 0.8, 0, 0.6]])
    (order,) = sads_select(GOLDEN[None], weight, 4)
    assert sorted(order.tolist()) == [1, 3, 4, 5]
    assert order[0] == 1


def test_the_least_sensitive_token_comes_last():
    weight = torch.tensor([[0.2, 1, 0.3, 0.9, 0.5, 0.8, 0, 0.6]])
    assert sads_select(GOLDEN[None], weight, 8)[0, -1] == 6


def test_sensitivity_of_a_linear_projector_is_constant():
    g = torch.Generator().manual_seed(0)
    matrix, x = (torch.randn(*s, generator=g, dtype=torch.float64) for s in [(6, 8), (1, 20, 6)])
    units = directions_of(16, 6)
    score = of_any_projector(x, lambda v: v @ matrix + 1, units, 0.01)
    expected = (units.double() @ matrix).norm(dim=1).mean()
    torch.testing.assert_close(score, expected.expand(1, 20))
    # then every token weighs 1: max-min from the first token
    features = x @ matrix
    plain = maxmin_select(features, 7, first=torch.tensor([0]))
    assert torch.equal(sads_select(features, score, 7), plain)


def test_the_projector_sees_at_least_fp32():
    tokens = make_tokens(1, 6, dtype=torch.float16)
    seen = []

    def spy(x):
        seen.append(x.dtype)
        return tokens.projector(x)

    ZOOPrune(m=3).plan(replace(tokens, projector=spy, two_layer=None), 2)
    assert seen == [torch.float32] * 6


def test_without_a_two_layer_mlp_the_projector_runs_twice_a_direction_bit_for_bit():
    tokens = replace(make_tokens(2, 30), two_layer=None)
    x, units = tokens.vision_features, directions_of(5, 6)
    total = torch.zeros(2, 30)
    for u in units:
        total += (tokens.projector(x + 0.01 * u) - tokens.projector(x - 0.01 * u)).norm(dim=-1)
    assert torch.equal(sensitivity(tokens, units, 0.01, "mean"), total / (2 * 0.01 * 5))


@pytest.mark.parametrize("average", ["mean", "rms"])
def test_a_two_layer_mlp_gives_the_same_scores_and_tokens_without_the_projector(average):
    def forbidden(x):
        raise AssertionError("the projector ran")

    tokens = map_tensors(make_tokens(2, 60), lambda t: t.double() if t.is_floating_point() else t)
    shared = replace(tokens, projector=forbidden)
    plain = replace(tokens, two_layer=None)
    units = directions_of(7, 6)
    torch.testing.assert_close(
        *(sensitivity(t, units, 1e-4, average) for t in (shared, plain)), rtol=1e-6, atol=0
    )
    method = ZOOPrune(m=7, h=1e-4, average=average)
    assert torch.equal(method.plan(shared, 20).keep, method.plan(plain, 20).keep)


def merger(patches, *, layer, dtype=torch.float64):
    """Weights of a norm of patches and an MLP, and the same as a callable in its input's dtype."""
    g = torch.Generator().manual_seed(patches)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    norm = PatchNorm(
        patches=patches,
        weight=1 + normal(6) / 4,
        bias=normal(6) if layer else None,
        eps=1e-6,
        layer=layer,
    )
    mlp = TwoLayer(
        w1=normal(20, patches * 6) / 4, b1=normal(20), w2=normal(9, 20), b2=normal(9), norm=norm
    )

    def project(x):
        parts, weight = x.unflatten(-1, (patches, 6)), norm.weight.to(x)
        if layer:
            parts = F.layer_norm(parts, (6,), weight, norm.bias.to(x), norm.eps)
        else:
            parts = F.rms_norm(parts, (6,), weight, norm.eps)
        hidden = F.gelu(F.linear(parts.flatten(-2), mlp.w1.to(x), mlp.b1.to(x)))
        return F.linear(hidden, mlp.w2.to(x), mlp.b2.to(x))

    return mlp, project


def merged(mlp, project, count=50):
    """A bucket of token inputs that lie off the origin, as a last encoder block's do."""
    x = 3 + 2 * torch.randn(2, count, mlp.w1.shape[1], generator=torch.Generator().manual_seed(1))
    features = project(x)
    return only(features=features, vision_features=x, projector=project, two_layer=mlp)


MERGERS = pytest.mark.parametrize(
    ("patches", "layer"), [(4, True), (4, False), (1, True), (1, False)]
)


@pytest.mark.parametrize("at_a_time", [1, 1 << 9, 1 << 20])
@pytest.mark.parametrize("average", ["mean", "rms"])
@MERGERS
def test_a_norm_before_the_mlp_shares_work_too(patches, layer, average, at_a_time, monkeypatch):
    monkeypatch.setattr("vispress.methods._parts.scoring.normed_mlp.ON_HOST", at_a_time)
    mlp, project = merger(patches, layer=layer)
    tokens, units = merged(mlp, project), directions_of(7, 6 * patches).double()
    x = tokens.vision_features.double()
    expected = of_any_projector(x, project, units, 0.01, average)
    ours = sensitivity(replace(tokens, vision_features=x), units, 0.01, average)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)
    # in fp32 as near to fp64 as the calls of the projector
    single = units.float()
    called = of_any_projector(x.float(), project, single, 0.01, average).double()
    error = (sensitivity(tokens, single, 0.01, average).double() - expected).abs().max()
    assert error <= 2 * (called - expected).abs().max()


@MERGERS
def test_the_merger_does_not_run_and_the_same_tokens_are_kept(patches, layer):
    def forbidden(x):
        raise AssertionError("the projector ran")

    mlp, project = merger(patches, layer=layer)
    tokens = merged(mlp, project)
    shared = ZOOPrune(m=8).plan(replace(tokens, projector=forbidden), 15)
    assert torch.equal(shared.keep, ZOOPrune(m=8).plan(replace(tokens, two_layer=None), 15).keep)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@MERGERS
def test_half_weights_round_changes_not_activations(patches, layer, dtype, error):
    mlp, project = merger(patches, layer=layer, dtype=dtype)
    mlp.w1.copy_(mlp.w1 * 2**-6)  # changes that would drown in fp16 as they are
    mlp.b1.copy_(mlp.b1 * 2**-9)
    tokens, units = merged(mlp, project), directions_of(16, 6 * patches)
    exact = of_any_projector(tokens.vision_features.double(), project, units.double(), 1e-3)
    ours = sensitivity(tokens, units, 1e-3, "mean")
    torch.testing.assert_close(ours.double(), exact, rtol=error, atol=0)


def test_a_patch_that_is_constant_and_one_that_a_step_cancels():
    mlp, project = merger(4, layer=True)
    units = directions_of(3, 24).double()
    tokens = merged(mlp, project)
    x = tokens.vision_features.double().clone()
    x[0, 0], x[0, 1] = 2.0, 2 - 0.01 * units[1]
    ours = sensitivity(replace(tokens, vision_features=x), units, 0.01, "mean")
    torch.testing.assert_close(ours, of_any_projector(x, project, units, 0.01), rtol=1e-6, atol=0)


def test_a_merger_never_waits_for_the_device():
    mlp, project = merger(4, layer=True, dtype=torch.float16)
    tokens = map_tensors(merged(mlp, project), lambda t: t.to("meta"))
    tokens = replace(tokens, two_layer=mlp.to("meta"))
    assert sensitivity(tokens, directions_of(3, 24), 0.01, "mean").shape == (2, 50)


def test_memory_does_not_grow_with_directions(monkeypatch):
    monkeypatch.setattr("vispress.methods._parts.scoring.normed_mlp.ON_HOST", 1 << 14)
    mlp, project = merger(4, layer=True, dtype=torch.float32)
    tokens, peaks = merged(mlp, project, 512), []
    for m in (8, 64):
        units = directions_of(m, 24)
        with LiveBytes() as memory:
            sensitivity(tokens, units, 0.01, "mean")
        peaks.append(memory.peak)
    # the factors of 4 patches, two passes and all directions, not 20 hidden units of each
    assert peaks[1] - peaks[0] < 56 * 1024 * 20 * 4


def test_the_root_mean_square_is_at_least_the_mean_and_near_it():
    tokens, units = make_tokens(1, 50), directions_of(64, 6)
    mean, rms = (sensitivity(tokens, units, 0.01, average) for average in ("mean", "rms"))
    assert (rms >= mean).all()
    ratio = rms / mean
    assert ratio.max() < 1.4  # 6 inputs; at 1024 the two differ by 1e-3
    assert torch.corrcoef(torch.stack([mean[0], rms[0]]))[0, 1] > 0.99


def test_the_seed_decides_the_directions():
    tokens = make_tokens(1, 200)
    keeps = [ZOOPrune(m=1, seed=s).plan(tokens, 40).keep.tolist() for s in (0, 0, 1)]
    assert keeps[0] == keeps[1] != keeps[2]


def test_sub_images_are_selected_on_their_own():
    crops = anyres(side=4, rows=1, cols=2, newlines=True)
    tokens = make_tokens(2, crops=crops)
    keep = ZOOPrune(m=4).plan(tokens, 4 + 15).keep
    score = sensitivity(tokens, directions_of(4, 6), 0.01, "mean")
    expected = [torch.where(crops.segment == -1)[0].expand(2, -1)]
    for s in range(3):
        places = torch.where(crops.segment == s)[0]
        expected.append(places[sads_select(tokens.features[:, places], score[:, places], 5)])
    assert torch.equal(keep, torch.cat(expected, dim=1).sort(dim=1).values)


def test_published_counts_are_truncated():
    counts = [
        ZOOPrune(keep_ratio=r).placements(32)[0].budget.resolve(576)
        for r in (0.1112, 0.2223, 0.3334)
    ]
    assert counts == [64, 128, 192]


@pytest.mark.refusal
@pytest.mark.parametrize(
    "bad", [{"m": 0}, {"m": 2.5}, {"h": 0}, {"h": -0.1}, {"seed": -1}, {"average": "max"}], ids=str
)
def test_bad_hyper_parameters_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        ZOOPrune(**bad)
