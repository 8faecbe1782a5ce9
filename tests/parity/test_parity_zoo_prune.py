"""ZOO-Prune against its official code."""

import torch
from tests.parity.vectors import close, each_case
from torch.nn.functional import gelu

from vispress.methods import ZOOPrune
from vispress.methods.zoo_prune import perturbation_scores, sads_select


def projector(case):
    """The official stub: linear, exact GELU, linear."""
    w1, b1, w2, b2 = (case[f"in/proj_{name}"] for name in ("w1", "b1", "w2", "b2"))
    return lambda x: gelu(x @ w1.to(x).mT + b1.to(x)) @ w2.to(x).mT + b2.to(x)


@each_case("zoo_prune", having="in/pre_features")
def test_sensitivity(case):
    directions, h = case["in/directions_raw"], case["param/h"]
    assert len(directions) == case["param/m"]
    x = case["in/pre_features"][None]
    close(
        perturbation_scores(x, projector(case), directions, h)[0], case["out/importance"], rtol=2e-3
    )
    exact = perturbation_scores(x.double(), projector(case), directions, h)[0]
    close(exact, case["out/importance_float64"])


@each_case("zoo_prune", having="in/pre_features")
def test_selection_from_the_projector(case):
    x = case["in/pre_features"][None].double()
    project = projector(case)
    (placement,) = ZOOPrune(keep_ratio=case["param/ratio"]).placements(32)
    num_keep = placement.budget.resolve(x.shape[1])
    assert num_keep == case["param/keep_count"]
    importance = perturbation_scores(x, project, case["in/directions_raw"], case["param/h"])
    (order,) = sads_select(project(x), importance, num_keep)
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
