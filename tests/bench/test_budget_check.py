"""Off-target runs are errors."""

import pytest

from vispress.bench.plan.cells import Cell
from vispress.bench.run.budget_check import KeptTokens, check_budget, expected_counts
from vispress.config import make_compressor
from vispress.errors import BudgetError
from vispress.report import CompressionReport, ImageReport, PlacementReport, SampleReport

LAYERS = 4


def report(num_visual, placements):
    """A report of one image; `placements` are (layer, kept)."""
    made = tuple(PlacementReport("m", "in_llm", at, n, tuple(range(n))) for at, n in placements)
    last = made[-1]
    positions = tuple(range(num_visual))
    image = ImageReport("image", num_visual, last.num_kept, last.kept, positions, None, made)
    counts = [num_visual] * LAYERS
    for layer, kept in placements:
        counts[layer:] = [kept] * (LAYERS - layer)
    per_layer = tuple((count,) for count in counts)
    return CompressionReport((SampleReport((image,)),), LAYERS, 0, {}, per_layer, (), ())


def cell(method, **budget):
    return Cell(group=method, chain=(make_compressor(method, **budget),), keep_ratio=0.5)


def test_on_target_passes():
    check_budget(cell("fastv", keep_ratio=0.5, layer=1), report(16, [(1, 8)]))


@pytest.mark.parametrize("kept", [7, 9])
def test_one_token_off_is_an_error(kept):
    with pytest.raises(BudgetError, match=rf"fastv--0.5 is off target: it kept \[{kept}\] of 16"):
        check_budget(cell("fastv", keep_ratio=0.5, layer=1), report(16, [(1, kept)]))


def test_inexact_methods_may_keep_fewer_never_more():
    pooled = cell("avg_pool", keep_ratio=0.5)
    check_budget(pooled, report(16, [(0, 6)]))
    with pytest.raises(BudgetError, match="at most"):
        check_budget(pooled, report(16, [(0, 9)]))


def test_a_placement_that_never_ran_is_an_error():
    drop = cell("pyramiddrop", keep_ratio=0.5, layers=(1, 2, 3))
    counts = expected_counts(drop.chain, 16, LAYERS)
    check_budget(drop, report(16, list(zip((1, 2, 3), counts, strict=True))))
    with pytest.raises(BudgetError, match="off target"):
        check_budget(drop, report(16, [(1, counts[0])]))


def test_the_mean_over_layers_is_checked():
    # as asked at its own layer, but applied a layer late
    fastv = cell("fastv", mean_keep_ratio=0.5, layer=1)
    (kept,) = expected_counts(fastv.chain, 48, LAYERS)
    check_budget(fastv, report(48, [(1, kept)]))
    with pytest.raises(BudgetError, match=r"a mean of 32\.00 visual tokens a layer"):
        check_budget(fastv, report(48, [(2, kept)]))


def test_chains_hand_on_what_is_left():
    chain = (make_compressor("divprune", keep_ratio=0.5), make_compressor("fastv", keep_ratio=0.5))
    assert expected_counts(chain, 16, LAYERS) == [8, 4]


def test_kept_tokens_are_averaged_over_images():
    kept = KeptTokens()
    kept.add(report(16, [(2, 8)]))
    kept.add(report(16, [(2, 4)]))
    values = kept.to_dict()
    assert (values["images"], values["visual_tokens"], values["kept_at_end"]) == (2, 16, 6)
    assert values["kept_mean_over_layers"] == 11  # (12 + 10) / 2
