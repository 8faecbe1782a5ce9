"""Random, uniform and no image: the controls."""

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens

from vispress.errors import ConfigError
from vispress.methods import NoImage, Random, Uniform


def test_random_depends_on_the_seed_alone():
    a, b = make_tokens(3, 50, seed=0), make_tokens(2, 50, seed=1)
    kept = Random(seed=3).plan(a, 20).keep
    assert (kept == kept[:1]).all()
    assert torch.equal(Random(seed=3).plan(b, 20).keep, kept[:2])
    assert not torch.equal(Random(seed=4).plan(a, 20).keep, kept)


def test_random_draws_without_favour():
    tokens = make_tokens(1, 40)
    kept = torch.cat([Random(seed=s).plan(tokens, 10).keep[0] for s in range(200)])
    often = torch.bincount(kept, minlength=40)
    assert 25 <= often.min() <= often.max() <= 80  # 50 expected, spread 6


def test_random_shares_the_budget_of_crops():
    crops = anyres(side=4, rows=2, cols=2)
    kept = crops.segment[Random().plan(make_tokens(1, crops=crops), 28).keep[0]]
    assert [int((kept == s).sum()) for s in range(-1, 5)] == [8, 4, 4, 4, 4, 4]


def test_uniform_takes_the_middles_of_equal_runs():
    keep = Uniform().plan(make_tokens(2, 10), 4).keep
    assert keep.tolist() == [[1, 3, 6, 8]] * 2


def test_uniform_starts_again_in_every_frame():
    keep = Uniform().plan(make_tokens(1, grid=(2, 2, 5)), 8).keep
    assert keep.tolist() == [[1, 3, 6, 8, 11, 13, 16, 18]]


def test_uniform_in_two_dimensions_keeps_a_lattice():
    keep = Uniform(dims=2).plan(make_tokens(1, grid=(1, 4, 6)), 7).keep
    assert keep.tolist() == [[7, 9, 11, 19, 21, 23]]


def test_no_image_keeps_nothing():
    (placement,) = NoImage().placements(32)
    assert placement.budget.resolve(576) == 0
    assert NoImage().plan(make_tokens(3, 9), 0).keep.shape == (3, 0)


@pytest.mark.refusal
@pytest.mark.parametrize("bad", [-1, 0.5, None])
def test_bad_seeds_are_refused(bad):
    with pytest.raises(ConfigError, match="seed"):
        Random(seed=bad)
