"""ZOO-Prune against its official code."""

import pytest
import torch
from tests.methods.helpers import only
from tests.parity.vectors import close, each_case
from torch.nn.functional import gelu, normalize

from vispress.methods import ZOOPrune
from vispress.methods._parts.scoring.sensitivity import sensitivity
from vispress.methods.zoo_prune import sads_select
from vispress.types import TwoLayer


def projector(case):
    """The official stub: linear, exact GELU, linear."""
    w1, b1, w2, b2 = (case[f"in/proj_{name}"] for name in ("w1", "b1", "w2", "b2"))
    return lambda x: gelu(x @ w1.to(x).mT + b1.to(x)) @ w2.to(x).mT + b2.to(x)


def scores(case, x, *, shared):
    """Ours, with products shared between directions or by running the projector."""
    weights = {name: case[f"in/proj_{name}"] for name in ("w1", "b1", "w2", "b2")}
    tokens = only(
        vision_features=x,
        projector=projector(case),
        two_layer=TwoLayer(**weights) if shared else None,
    )
    directions = normalize(case["in/directions_raw"], dim=-1)
    return sensitivity(tokens, directions, case["param/h"], "mean")


@pytest.mark.parametrize("shared", [True, False])
@each_case("zoo_prune", having="in/pre_features")
def test_sensitivity(case, shared):
    assert len(case["in/directions_raw"]) == case["param/m"]
    x = case["in/pre_features"][None]
    close(scores(case, x, shared=shared)[0], case["out/importance"], rtol=2e-3)
    close(scores(case, x.double(), shared=shared)[0], case["out/importance_float64"])


@pytest.mark.parametrize("shared", [True, False])
@each_case("zoo_prune", having="in/pre_features")
def test_selection_from_the_projector(case, shared):
    x = case["in/pre_features"][None].double()
    (placement,) = ZOOPrune(keep_ratio=case["param/ratio"]).placements(32)
    num_keep = placement.budget.resolve(x.shape[1])
    assert num_keep == case["param/keep_count"]
    importance = scores(case, x, shared=shared)
    (order,) = sads_select(projector(case)(x), importance, num_keep)
    assert order.tolist() == case["out/selected_order"].tolist()


@each_case("zoo_prune", having="in/importance")
def test_selection_from_given_sensitivity(case):
    features, importance = case["in/features"], case["in/importance"]
    if "in/frame_label" not in case:
        (order,) = sads_select(features[None], importance[None], case["param/keep_count"])
        assert order.tolist() == case["out/selected_order"].tolist()
        return
    kept = []
    for label in case["in/frame_label"].unique():
        places = torch.where(case["in/frame_label"] == label)[0]
        if label != -9999:  # newlines
            count = min(len(places), case["param/keep_per_frame"])
            (order,) = sads_select(features[None, places], importance[None, places], count)
            kept.append(places[order])
    assert torch.cat(kept).sort().values.tolist() == case["out/selected_sorted"].tolist()
