"""The analytic counter: by hand, and against every published figure whose counts are known."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cost_cells import Cell
from tests.published_costs import DIFFERENT, FORMULAS, MATCHING
from vispress.budget import Budget
from vispress.errors import ConfigError
from vispress.flops import CONVENTIONS, average_tokens, flops, kv_bytes, visual_per_layer
from vispress.methods.divprune import DivPrune
from vispress.methods.fastv import FastV
from vispress.methods.pyramiddrop import PyramidDrop
from vispress.methods.vtw import VTW
from vispress.types import Placement, Stage

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


LAYERS = 8


@st.composite
def chains(draw: st.DrawFn) -> list[list[Placement]]:
    """Compressors that act one behind the other; rows that bypass layers come back before the next.

    Some of their placements hide nothing in a prefill.
    """
    chain: list[list[Placement]] = []
    reached = 0
    for _ in range(draw(st.integers(0, 3))):
        own = [
            Placement(stage=stage, budget=Budget(keep_ratio=0.5), layer=draw(st.integers(0, 7)))
            for stage in draw(st.lists(st.sampled_from([Stage.ENCODER, Stage.MASK, Stage.DECODE])))
        ]
        for _ in range(draw(st.integers(1, 3))):
            if (layer := draw(st.integers(reached, LAYERS))) == LAYERS:
                break
            until = draw(st.none() | st.integers(layer + 1, LAYERS))
            count = st.builds(lambda n: Budget(num_tokens=n), st.integers(0, 20))
            share = st.builds(lambda r: Budget(keep_ratio=r), st.floats(0.01, 1.0))
            own.append(
                Placement(
                    stage=Stage.IN_LLM if layer else Stage.PRE_LLM,
                    budget=draw(count | share),
                    layer=layer,
                    until=until,
                    images=draw(st.sampled_from(["all", "earlier", "last"])),
                )
            )
            reached = until or layer
        chain.append(own)
    return chain


def token_by_token(
    num_visual: int, chain: Sequence[Sequence[Placement]], *, last: bool
) -> list[int]:
    """Follow every token: a compressor keeps the first of those that it finds."""
    missing: dict[int, set[int]] = {token: set() for token in range(num_visual)}  # layers
    for placements in chain:
        entered = sum(LAYERS - 1 not in gone for gone in missing.values())
        for placement in placements:
            if placement.stage not in (Stage.PRE_LLM, Stage.IN_LLM):
                continue
            if placement.images == ("earlier" if last else "last"):
                continue
            there = [t for t, gone in missing.items() if placement.layer not in gone]
            away = range(placement.layer, placement.until or LAYERS)
            for token in there[placement.budget.resolve(entered) :]:
                missing[token] |= set(away)
    return [sum(layer not in gone for gone in missing.values()) for layer in range(LAYERS)]


@pytest.mark.slow
@given(chain=chains(), num_visual=st.integers(1, 24), last=st.booleans())
@settings(max_examples=300, deadline=None)
def test_counts_are_those_of_tokens_followed_one_by_one(
    chain: list[list[Placement]], num_visual: int, last: bool
) -> None:
    ours = visual_per_layer(num_visual, LAYERS, *chain, last=last)
    assert list(ours) == token_by_token(num_visual, chain, last=last)


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
