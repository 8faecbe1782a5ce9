"""Random mix: how many tokens are drawn, from where, and what cannot be mixed."""

import pytest
from tests.methods.helpers import (
    NOT_TO_A_BUDGET,
    adaptive_placements,
    like_fastv,
    make_tokens,
    single,
    with_scores,
)

from vispress.config import from_mapping, to_mapping
from vispress.errors import ConfigError
from vispress.methods import (
    AvgPool,
    DivPrune,
    FastV,
    NoImage,
    PruMerge,
    PyramidDrop,
    Random,
    RandomMix,
    SparseVLM,
)

SCORES = [i / 100 for i in range(40)]


def kept(method, tokens, count):
    return set(method.plan(tokens, count).keep[0].tolist())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_the_best_stay_and_the_rest_is_drawn_from_what_is_left(share):
    tokens = with_scores(SCORES)
    best = round(20 - round(share * 20))
    mixed = kept(RandomMix(share=share), tokens, 20)
    assert len(mixed) == 20
    assert set(range(40 - best, 40)) <= mixed
    drawn = mixed - set(range(40 - best, 40))
    assert len(drawn) == 20 - best
    if share in (0.5, 0.9):
        assert drawn != set(range(20, 40 - best))


def test_no_share_is_the_method_and_a_whole_one_is_random():
    tokens = make_tokens(grid=(1, 4, 6))
    for inner in (FastV(), DivPrune()):
        plain = inner.plan(tokens, 9).keep
        assert RandomMix(inner=inner, share=0.0).plan(tokens, 9).keep.equal(plain)
    drawn = RandomMix(share=1.0, seed=5).plan(tokens, 9).keep
    assert drawn.equal(Random(seed=5).plan(tokens, 9).keep)


def test_small_budgets_round_half_to_even():
    tokens = with_scores(SCORES)
    assert kept(RandomMix(share=0.5), tokens, 1) == {39}  # round(0.5) is 0
    assert kept(RandomMix(share=0.6), tokens, 1) == kept(Random(), tokens, 1)
    assert len(kept(RandomMix(share=0.5), tokens, 3) & {38, 39}) >= 1  # round(1.5) is 2


def test_seeds_differ_and_images_of_a_batch_are_as_alone():
    tokens = make_tokens(3, grid=(1, 6, 8))
    method = RandomMix(share=0.5)
    together = method.plan(tokens, 20).keep
    for b in range(3):
        assert together[b : b + 1].equal(method.plan(single(tokens, b), 20).keep)
    assert not together.equal(RandomMix(share=0.5, seed=1).plan(tokens, 20).keep)


def test_it_acts_where_the_inner_method_acts():
    mix = RandomMix(inner=PyramidDrop())
    assert mix.placements(32) == PyramidDrop().placements(32)
    assert mix.default_positions == "compact"
    assert from_mapping(to_mapping(mix)) == mix


@pytest.mark.refusal
@pytest.mark.parametrize(
    "inner", [SparseVLM(), AvgPool(), NoImage(), SparseVLM(rank_scale=1.0)], ids=lambda m: m.name
)
def test_what_merges_or_counts_for_itself_is_refused(inner):
    with pytest.raises(ConfigError, match=f"inner: {inner.name}"):
        RandomMix(inner=inner)


@pytest.mark.refusal
@pytest.mark.parametrize(("says", "value"), [("merges", True), *NOT_TO_A_BUDGET.items()], ids=str)
def test_each_reason_alone_is_refused(says, value):
    with pytest.raises(ConfigError, match="inner: fastv merges, or does not keep exactly"):
        RandomMix(inner=like_fastv(**{says: value}))


@pytest.mark.refusal
def test_placements_that_count_for_themselves_are_refused():
    counts = like_fastv(placements=adaptive_placements)
    with pytest.raises(ConfigError, match="inner: fastv decides its own counts; give it a budget"):
        RandomMix(inner=counts, keep_ratio=0.5).placements(32)


@pytest.mark.refusal
def test_values_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"share must be a number in \[0.0, 1.0\], got 1.5"):
        RandomMix(share=1.5)
    with pytest.raises(ConfigError, match="seed"):
        RandomMix(seed=-1)
    with pytest.raises(ConfigError, match="inner: prumerge"):
        RandomMix(inner=PruMerge())
