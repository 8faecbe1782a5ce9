"""The analytic counter: by hand, and against every published figure whose counts are known."""

import pytest

from tests.cost_cells import Cell
from tests.published_costs import DIFFERENT, FORMULAS, MATCHING
from vispress.errors import ConfigError
from vispress.flops import CONVENTIONS, average_tokens, flops, kv_bytes, visual_per_layer
from vispress.methods.divprune import DivPrune
from vispress.methods.fastv import FastV
from vispress.methods.pyramiddrop import PyramidDrop
from vispress.methods.vtw import VTW

ALLOWED = 0.01


def name(cell: Cell) -> str:
    return f"{cell.source}: {cell.what}"


@pytest.mark.parametrize("cell", MATCHING, ids=name)
def test_published_figures_are_reproduced(cell: Cell) -> None:
    assert cell.off <= ALLOWED, f"{cell.ours:.4f}, printed {cell.printed}"


@pytest.mark.parametrize("cell", DIFFERENT, ids=name)
def test_figures_that_do_not_follow_from_the_counts_differ(cell: Cell) -> None:
    assert cell.why
    assert cell.off > ALLOWED, f"{cell.ours:.4f}, printed {cell.printed}: it fits, move it"


def test_no_figure_is_listed_twice() -> None:
    names = [name(cell) for cell in (*MATCHING, *DIFFERENT)]
    assert len(set(names)) == len(names)


def test_a_wrong_convention_would_be_found() -> None:
    """The figures tell the conventions apart: 0.8 holds cells of all three."""
    assert {cell.what.split(",")[0] for cell in FORMULAS} >= set(CONVENTIONS)


# width 2, MLP width 3, layers of 5 and 1 tokens:
#   4nd^2 = 80 + 16, 2n^2 d = 100 + 4, ndm = 30 + 6
@pytest.mark.parametrize(
    ("convention", "by_hand"), [("mac3", 308), ("flop3", 616), ("fastv2", 272)]
)
def test_flops_by_hand(convention: str, by_hand: int) -> None:
    assert flops([5, 1], 2, 3, convention) == by_hand
    assert flops([], 2, 3, convention) == 0


def test_averages_and_caches_by_hand() -> None:
    assert average_tokens([5, 1]) == 3.0
    assert kv_bytes([5, 1], 7) == 2 * 6 * 7 * 2
    assert kv_bytes([5, 1], 7, itemsize=4) == 2 * 6 * 7 * 4


def test_counts_come_from_placements() -> None:
    assert visual_per_layer(10, 3) == (10, 10, 10)
    assert visual_per_layer(10, 4, FastV(keep_ratio=0.5, layer=1).placements(4)) == (10, 5, 5, 5)
    assert visual_per_layer(10, 4, DivPrune(num_tokens=3).placements(4)) == (3, 3, 3, 3)
    assert visual_per_layer(10, 4, VTW().placements(4)) == (10, 10, 0, 0)
    pyramid = PyramidDrop(layers=(1, 3), ratios=(0.5, 0.2)).placements(4)
    assert visual_per_layer(10, 4, pyramid) == (10, 5, 5, 2)


def test_a_chain_counts_from_what_the_compressor_before_has_left() -> None:
    first = DivPrune(keep_ratio=0.5).placements(4)
    then = PyramidDrop(layers=(1, 2), ratios=(0.5, 0.25)).placements(4)
    assert visual_per_layer(16, 4, first, then) == (8, 4, 2, 2)
    # an image smaller than the budget stays whole
    assert visual_per_layer(2, 2, DivPrune(num_tokens=3).placements(2)) == (2, 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: flops([1], 1, 1, "mac2"), "convention must be one of.*'mac2'"),
        (lambda: flops([4, -1], 1, 1), "at least 0, got -1"),
        (lambda: kv_bytes([-2], 1), "at least 0, got -2"),
        (lambda: average_tokens([]), "at least one decoder layer"),
        (lambda: visual_per_layer(4, 0), "num_layers must be at least 1, got 0"),
        (lambda: visual_per_layer(-4, 2), "at least 0, got -4"),
    ],
)
def test_bad_counts_are_named(call, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call()
