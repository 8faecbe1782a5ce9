"""DivPrune against its official code."""

from tests.methods.helpers import only
from tests.parity.vectors import close, each_case

from vispress.methods import DivPrune
from vispress_kernels.assign_nearest import assign_nearest
from vispress_kernels.maxmin_select import maxmin_select


@each_case("divprune")
def test_keeps_what_the_official_code_keeps(case):
    x = case["in/x"][None]
    method = DivPrune(keep_ratio=case["param/ratio"])
    (placement,) = method.placements(32)
    num_keep = placement.budget.resolve(x.shape[1])
    assert num_keep == case["param/keep_count"]
    _, nearest = assign_nearest(x, x, exclude_self=True)
    close(1 - nearest[0], case["out/first_score"])
    (keep,) = method.plan(only(features=x), num_keep).keep
    if case["flag/ties"]:
        # the official code repeats picks here, which a plan may not
        assert len(keep.unique()) == num_keep
        assert case["out/n_unique"] <= num_keep
        return
    assert keep.tolist() == case["out/selected_sorted"].tolist()
    (order,) = maxmin_select(x, num_keep)
    assert order.tolist() == case["out/selected_order"].tolist()
