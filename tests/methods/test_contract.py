"""What every registered method's plans promise, whatever it computes."""

import dataclasses
import pickle
from contextlib import contextmanager

import pytest
import torch
from tests.methods.helpers import (
    all_tensors,
    anyres,
    make_tokens,
    map_tensors,
    same_plan,
    single,
    take,
)

from vispress.errors import UnsupportedMethodError
from vispress.methods.base import ScorePruner
from vispress.methods.cache_evictor import CacheEvictor
from vispress.methods.gist_evictor import GistEvictor
from vispress.methods.pair_masker import PairMasker
from vispress.registry import get_method, list_methods
from vispress.types import ModuleShape, Signal

BUILT_IN = [n for n in list_methods() if get_method(n).__module__.startswith("vispress.")]

GEOMETRIES = {
    "image": {"grid": (1, 4, 6)},
    "video": {"grid": (3, 3, 4)},
    "anyres": {"crops": anyres(4, 2, 2)},
    "unpadded": {"crops": anyres(4, 1, 3, top=1)},
    "no_newlines": {"crops": anyres(3, 2, 1, left=1, newlines=False)},
}
# few; a count that fits no grid; all but one
COUNTS = [1, 2, 7, 13, -1]


# choices that change what is read or how, by method
OTHER_SETTINGS = {
    "layerwise": [{"queries": "text"}],
    "adsc": [{"mode": "1d"}, {"offset": "first"}],
    "cdpruner": [{"relevance": "none"}, {"variant": "openvino"}],
    "dycoke": [{"num_tokens": 7}],
    "fastvid": [{"num_tokens": 7}, {"variant": "video"}, {"variant": "video", "retained": 0.6}],
    "flashvlm": [{"gating": True}],
    "quadtree_merge": [
        {"theta": 1.5},
        {"num_tokens": 7},
        {"theta": 0.9, "linkage": "average"},
    ],
    "prumerge": [{"plus": True}, {"num_tokens": 7}, {"num_tokens": 7, "plus": True}],
    "sparsevlm": [{"rank_scale": 1.0}],
    "sparsevlm_plus": [{"heads": 1}],
    "catp": [{"text_weight": 0.0}],
    "hired": [{"marks": "cells"}],
    "mmtok": [{"alpha": 0.0}],
    "scope": [{"alpha": 0.0}],
    "tome": [{"inflect": -0.5}],
    "globalcom2": [{"logits": False}],
    "prunevid": [{"num_tokens": 7}, {"keep_ratio": 0.4, "threshold": 0.0}, {"threshold": 0.0}],
    "hicom": [
        {"num_tokens": 7},
        {"num_tokens": 7, "local_injection": "off", "global_injection": "fine"},
        {"local_injection": "coarse", "side": 2, "frames": 1},
    ],
    "holitom": [
        {"inner": True},
        {"num_tokens": 7},
        {"context": 0.4, "threshold": 0.0, "keep_ratio": 0.5},
    ],
    "voco": [{"token_id": 9, "hide": "prefix"}],
    "pmod": [{"norm": "sigmoid"}, {"norm": "softmax"}],
    "lvlm_csp": [{"representatives": "random"}, {"representatives": "cls"}],
    "holov": [{"variant": "paper", "num_crops": 3}],
    "ensemble": [
        {"parts": ("fastv", "fastv"), "weights": (1.0, 0.0), "normalise": "rank"},
        {"parts": ("fastervlm", "vtc_cls", "max_norm"), "weights": (1.0, 2.0, 0.5)},
    ],
    "per_image": [{"factors": (1.0, 0.25)}, {"inner": "divprune", "factors": (0.1,)}],
    "random_mix": [
        {"inner": "divprune", "share": 0.5},
        {"inner": "transprune", "share": 1.0},
        {"inner": "ensemble", "share": 0.3, "seed": 3},
    ],
    "debias": [
        {"inner": "pyramiddrop"},
        {"inner": "sparsevlm", "slope": -1.0},
        {"shrink": True},
        {"suppress_padding": False, "variant": "paper"},
    ],
}


def variants(name):
    """The method as a user would get it, and with each choice that changes what it reads."""
    cls = get_method(name)
    fields = {f.name for f in dataclasses.fields(cls)}
    asked = [{}]
    if "scores" in fields:
        asked.append({"scores": "column_mean"})
    if "values" in fields:
        asked += [{"values": "features"}, {"values": "vision_features"}]
    if "dims" in fields:
        asked.append({"dims": 2})
    if "direction" in fields:
        asked.append({"direction": "abs"})
    asked += OTHER_SETTINGS.get(name, [])
    return [cls(**a) for a in asked]


METHODS = [pytest.param(name, id=name) for name in BUILT_IN]
VIDEO_ONLY = {n for n in BUILT_IN if get_method(n).needs == "video"}
CUTS_SCENES = {"fastvid", "holitom", "prunevid"}
BUDGETED = [name for name in BUILT_IN if get_method(name).takes_budget]
VARIANTS = [
    pytest.param(m, id="-".join([name, *(str(i) for i in [i] if i)]))
    for name in BUILT_IN
    for i, m in enumerate(variants(name))
]


def chosen(rule):
    """The variants that a rule is true of."""
    return [param for param in VARIANTS if rule(param.values[0])]


def ranks(method):
    """Whether the method orders tokens by something in the bucket, and all of them together."""
    if getattr(method, "variant", None) == "openvino":  # halves
        return False
    greedy = method.name in ("catp", "cdpruner", "divprune", "mmtok", "scope", "zoo_prune")
    return greedy or (isinstance(method, ScorePruner) and method.name != "random")


def acts_before_the_llm(method):
    """Whether the method reads nothing that only the LLM's layers give."""
    inside = {Signal.QUERY_ATTENTION, Signal.KEY_NORMS, Signal.TRANSITION, Signal.UPDATE_NORM}
    return not method.signals() & inside


def counts_by_shape(method):
    """Whether counts follow from shapes alone; an image that decides its own must be looked at."""
    return not getattr(method, "adaptive", False)


def never_waits(method):
    """Whether nothing is fetched; scenes of a video are cut on the host, fetched once a bucket."""
    return counts_by_shape(method) and method.name not in CUTS_SCENES


def kept(plan):
    """Kept tokens of each image, as lists."""
    return [keep.tolist() for keep in plan.keep]


def bucket(method, geometry="image", **kwargs):
    """Random tokens with as many encoder layers as the method asks of a 6-layer encoder.

    Methods for videos never see anything else.
    """
    geometry = "video" if method.name in VIDEO_ONLY else geometry
    layers = method.encoder_layers(6, 4)
    tokens = make_tokens(**GEOMETRIES[geometry], encoder_layers=len(layers), **kwargs)
    tokens = with_module(method, tokens)
    # before the LLM there is no attention of it
    early = method.name in ("catp", "holitom", "lvlm_csp", "prunevid", "vscan")
    context = dataclasses.replace(tokens.context, query=None, earlier=None)
    at_entry = dataclasses.replace(tokens, query_attention=None, context=context)
    return at_entry if early else tokens


def with_module(method, tokens):
    """The tokens in front of the last layer that it acts at, and drawn parameters."""
    if not method.trained:
        return tokens
    width, vision_width = tokens.features.shape[-1], tokens.vision_features.shape[-1]
    shape = ModuleShape(
        width=width,
        vision_width=vision_width,
        num_layers=8,
        num_heads=2,
        vision_layers=6,
        encoder_width=vision_width,
    )
    module, generator = method.make_module(shape), torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    last = max((int(n) for n, _ in module.named_children() if n.isdigit()), default=7)
    return dataclasses.replace(tokens, module=module, depth=(last, 8))


def shown(method):
    """Geometries that the method may see."""
    return ["video"] if method.name in VIDEO_ONLY else [*GEOMETRIES]


@contextmanager
def named(case):
    """Name the case in a failure."""
    try:
        yield
    except Exception as error:
        error.add_note(f"with {case}")
        raise


def count_for(method, tokens, count):
    """The budget the runtime would hand over."""
    if isinstance(method, PairMasker | CacheEvictor | GistEvictor):
        return tokens.num_visual
    if not method.takes_budget:
        return method.placements(8)[-1].budget.resolve(tokens.num_visual)
    return count if count > 0 else tokens.num_visual + count


def planned(method, tokens, count=7):
    return method.plan(tokens, count_for(method, tokens, count))


# --- plans


@pytest.mark.parametrize("method", VARIANTS)
def test_plans_are_well_formed_and_meet_the_budget(method):
    for geometry in shown(method):
        with named(geometry):
            tokens = bucket(method, geometry)
            for count in COUNTS:
                num_keep = count_for(method, tokens, count)
                plan = method.plan(tokens, num_keep)
                plan.check(tokens, num_keep, exact=method.exact and counts_by_shape(method))
                plan.check_values(tokens)
                assert max(plan.counts) <= num_keep
                assert all(keep.dtype == torch.int64 for keep in plan.keep)
                if num_keep:
                    assert min(plan.counts) >= 1
                if plan.features is not None:
                    assert plan.features.shape == (2, max(plan.counts), tokens.features.shape[-1])
                    assert plan.features.dtype == tokens.features.dtype
                if plan.gate is not None:
                    assert plan.gate.shape == tokens.features.shape[:2]
                    assert plan.gate.dtype == torch.float32
                if plan.assign is not None:
                    for assign, keep in zip(plan.assign, plan.keep, strict=True):
                        assert assign[keep].tolist() == list(range(len(keep)))
                assert (plan.assign is not None or plan.features is not None) == method.merges


@pytest.mark.parametrize("method", VARIANTS)
def test_an_image_gets_the_plan_it_would_get_alone(method):
    for geometry in shown(method):
        with named(geometry):
            tokens = bucket(method, geometry, batch=3)
            together = planned(method, tokens)
            for b in range(3):
                alone = planned(method, single(tokens, b))
                row = dataclasses.replace(
                    together,
                    **{
                        key: value[b : b + 1]
                        for key in ("keep", "assign", "weight", "features", "gate")
                        if (value := getattr(together, key)) is not None
                    },
                    losses={name: loss[b : b + 1] for name, loss in together.losses.items()},
                )
                assert same_plan(row, alone)


@pytest.mark.parametrize("method", VARIANTS)
def test_only_declared_signals_are_read(method):
    for geometry in shown(method):
        with named(geometry):
            tokens = bucket(method, geometry)
            hidden = {str(s): None for s in set(Signal) - method.signals()}
            assert same_plan(
                planned(method, tokens), planned(method, dataclasses.replace(tokens, **hidden))
            )


@pytest.mark.parametrize("method", VARIANTS)
def test_inputs_and_the_global_generator_are_untouched(method):
    for geometry in shown(method):
        tokens = bucket(method, geometry)
        before = [t.clone() for t in all_tensors(tokens)]
        state = torch.get_rng_state()
        planned(method, tokens)
        assert torch.equal(torch.get_rng_state(), state)
        after = all_tensors(tokens)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("method", VARIANTS)
def test_the_same_tokens_give_the_same_plan(method):
    tokens = bucket(method)
    torch.manual_seed(1)
    first = planned(method, tokens)
    torch.manual_seed(2)
    assert same_plan(first, planned(pickle.loads(pickle.dumps(method)), tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", VARIANTS)
def test_half_precision_decides_as_its_values_in_fp32(method, dtype):
    half = bucket(method, "anyres", dtype=dtype)
    full = map_tensors(half, lambda t: t.float() if t.dtype == dtype else t)
    in_half, in_full = planned(method, half), planned(method, full)
    assert kept(in_half) == kept(in_full)
    if in_half.features is not None:
        assert in_half.features.dtype == dtype
        close = 8 * torch.finfo(dtype).eps
        for b, count in enumerate(in_half.counts):
            torch.testing.assert_close(
                in_half.features[b, :count].float(),
                in_full.features[b, :count],
                rtol=close,
                atol=close,
            )
    if in_half.assign is not None:
        assert torch.equal(in_half.assign, in_full.assign)
        assert in_half.weight.dtype == torch.float32


@pytest.mark.parametrize("method", VARIANTS)
def test_double_precision_stays(method):
    tokens = map_tensors(bucket(method), lambda t: t.double() if t.is_floating_point() else t)
    if isinstance(method, ScorePruner) and method.name != "random":
        assert method.score(tokens).dtype == torch.float64
    assert planned(method, tokens).check_values(tokens) is None


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.full)])
@pytest.mark.parametrize("method", chosen(never_waits))
def test_planning_never_waits_for_the_device(method, few):
    # code is told apart by shapes: a grid and one kind of crops do by default
    first = ("video",) if method.name in VIDEO_ONLY else ("image", "unpadded")
    for geometry in [g for g in shown(method) if (g in first) is few]:
        with named(geometry):
            # meta tensors have no values: reading one on the host is an error
            tokens = map_tensors(bucket(method, geometry), lambda t: t.to("meta"))
            tokens = dataclasses.replace(tokens, two_layer=tokens.two_layer.to("meta"))
            if tokens.module is not None:
                tokens.module.to("meta")
            real = planned(method, bucket(method, geometry))
            assert planned(method, tokens).counts == real.counts


@pytest.mark.parametrize("method", VARIANTS)
def test_values_carry_gradients_and_decisions_do_not(method):
    tokens = map_tensors(
        bucket(method), lambda t: t.requires_grad_() if t.is_floating_point() else t
    )
    plan = planned(method, tokens)
    assert plan.weight is None or not plan.weight.requires_grad
    assert plan.features is None or plan.features.requires_grad
    assert (plan.gate is not None) == method.gates
    assert plan.gate is None or plan.gate.requires_grad


@pytest.mark.parametrize("method", VARIANTS)
def test_plans_are_soft_in_training_alone(method):
    tokens = bucket(method)
    assert planned(method, tokens).soft is None
    tokens = dataclasses.replace(tokens, training=True)
    plan = planned(method, tokens)
    plan.check_values(tokens)
    assert (plan.soft is not None) == (method.softens is not None)
    assert plan.soft is None or plan.soft.requires_grad


@pytest.mark.parametrize("method", chosen(ranks))
def test_constant_signals_keep_the_earlier_tokens(method):
    tokens = map_tensors(
        bucket(method), lambda t: torch.full_like(t, 0.25) if t.is_floating_point() else t
    )
    assert planned(method, tokens).keep.tolist() == [list(range(7))] * 2


@pytest.mark.parametrize("geometry", ["video", "anyres"])
@pytest.mark.parametrize("method", chosen(acts_before_the_llm))
def test_a_second_compressor_sees_what_the_first_left(method, geometry):
    tokens = with_module(method, make_tokens(**GEOMETRIES[geometry]))
    # rows differ in which places are left, so that geometry has to be looked up
    first = get_method("divprune")(num_tokens=20)
    left = take(tokens, first.plan(tokens, 20).keep)
    if (
        method.name in ("fourier", "avg_pool", "hicom", "pvc", "quadtree_merge", *VIDEO_ONLY)
        or getattr(method, "dims", 1) == 2
    ):
        with pytest.raises(UnsupportedMethodError, match="whole images"):
            planned(method, left)
        return
    plan = planned(method, left)
    plan.check(left, count_for(method, left, 7), exact=method.exact and counts_by_shape(method))
    plan.check_values(left)
    for b in range(2):
        assert kept(plan)[b : b + 1] == kept(planned(method, single(left, b)))
