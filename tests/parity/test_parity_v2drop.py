"""V2Drop against its official code, whose layers but those in front of a stage add nothing."""

import torch
from tests.methods.helpers import only
from tests.parity.vectors import close, each_case

from vispress.methods import V2Drop


def method_of(case):
    """The case's schedule; the ratios there are of what is left."""
    layers, left = tuple(case["param/layers"].tolist()), case["param/ratios"].tolist()
    ratios = (left[0], left[0] * left[1], left[0] * left[1] * left[2])
    return V2Drop(layers=layers, ratios=ratios)


@each_case("v2drop")
def test_keeps_what_the_official_code_keeps(case):
    method, N, start = method_of(case), case["param/image_tokens"], case["param/image_start"]
    L, visual = case["param/n_layers"], slice(start, start + N)
    left, ran = torch.arange(N), []
    hidden = case["in/hidden0"][visual]
    for stage, place in enumerate(method.placements(L)):
        before = hidden
        hidden = hidden + case["in/delta"][stage][visual]
        score = torch.linalg.vector_norm(hidden - before, dim=1)[left]
        close(score, case[f"out/stage{stage}_score"])
        ran += [len(left)] * (place.layer - len(ran))
        num_keep = place.budget.resolve(N)
        if num_keep < len(left):
            left = left[method.plan(only(update_norm=score[None]), num_keep).keep[0]]
        assert left.tolist() == case[f"out/stage{stage}_keep_sorted_rel"].tolist()
    assert ran + [len(left)] * (L - len(ran)) == case["out/visual_per_layer"].tolist()
