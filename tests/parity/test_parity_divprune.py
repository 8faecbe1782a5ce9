"""DivPrune against its official code."""

from tests.methods.helpers import only
from tests.parity.vectors import close, each_case

from vispress.methods import DivPrune
from vispress.methods.diversity import maxmin_select, nearest_distance, unit


@each_case("divprune")
def test_keeps_what_the_official_code_keeps(case):
    x = case["in/x"][None]
    method = DivPrune(keep_ratio=case["param/ratio"])
    (placement,) = method.placements(32)
    num_keep = placement.budget.resolve(x.shape[1])
    assert num_keep == case["param/keep_count"]
    first = nearest_distance(unit(x))
    close(first[0], case["out/first_score"])
    (keep,) = method.plan(only(features=x), num_keep).keep
    if case["flag/ties"]:
        # the official code repeats picks here, which a plan may not
        assert len(keep.unique()) == num_keep
        assert case["out/n_unique"] <= num_keep
        return
    assert keep.tolist() == case["out/selected_sorted"].tolist()
    (order,) = maxmin_select(unit(x), num_keep, first.argmax(dim=1))
    assert order.tolist() == case["out/selected_order"].tolist()
