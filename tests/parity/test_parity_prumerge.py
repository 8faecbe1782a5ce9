"""PruMerge and PruMerge+ against their official code."""

import torch
from tests.methods.helpers import only
from tests.parity.vectors import close, each_case

from vispress.methods import PruMerge
from vispress.methods.base import descending
from vispress.methods.prumerge import add_neighbours, choose, equal_steps, outliers
from vispress.runtime.hooks.attention import Softmax, attention_rows


def inputs(case):
    """Attention `[1, N]`, keys and features `[1, N, C]`; the official softmax is over [CLS] too."""
    query, keys = case["in/q_cls"][None, None, None], case["in/keys"][None, None]
    a = attention_rows(query, keys, None, Softmax(keys.shape[-1] ** -0.5))[:, 0, 0, 1:]
    return a, keys[:, 0, 1:], case["in/hidden_with_cls"][None, 1:]


@each_case("prumerge")
def test_merges_what_the_official_code_merges(case):
    a, keys, x = inputs(case)
    close(a[0], case["out/cls_attn"])
    n, plus = a.shape[1], bool(case["param/plus"])
    if case["param/adaptive"]:
        assert outliers(a[0]) == case["out/n_outliers"]
        order = choose(a, n - 1, plus, adaptive=True)
    else:
        # fixed shares, in the official code for training; equal steps start half a step in
        order = descending(a)[:, : case["out/n_top"]]
        if plus:
            step = case["out/step"]
            order = torch.cat([order, torch.arange(step // 2, n - 1, step)[None]], dim=1)
    assert order[0].tolist() == case["out/kept_order"].tolist()
    if len(order.unique()) < order.shape[1]:
        return  # a token twice: the official training branch mixes up its rows, and is not offered
    kept, rest = add_neighbours(order, a, keys, x, case["param/k_neighbours"])
    close(torch.cat([kept, rest[:, None]], dim=1)[0], case["out/tokens"])


@each_case("prumerge", having="out/step")
def test_steps_of_the_plus_variant(case):
    if case["param/plus"] and case["param/adaptive"]:
        steps = equal_steps(len(case["out/cls_attn"]), case["out/reduction_ratio_f64"], "cpu")
        assert (steps[1] - steps[0]).item() == max(1, case["out/step"] // 3)


@each_case("prumerge", having="out/tokens")
def test_the_plan_holds_the_official_tokens(case):
    if not case["param/adaptive"]:
        return
    a, keys, x = inputs(case)
    tokens = only(
        vision_features=x,
        cls_wide_attention=a[:, None],
        vision_keys=keys[:, None],
        projector=lambda values: values,
    )
    plan = PruMerge(plus=bool(case["param/plus"])).plan(tokens, x.shape[1])
    order = case["out/kept_order"].tolist()
    (keep,) = plan.keep
    free = max(set(range(x.shape[1])) - set(order))
    assert keep.tolist() == sorted([*order, free])
    slots = [keep.tolist().index(place) for place in [*order, free]]
    close(plan.features[0, slots], case["out/tokens"])
