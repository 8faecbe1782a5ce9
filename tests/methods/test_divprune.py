"""DivPrune: greedy max-min selection, by hand."""

import torch
from tests.methods.helpers import only

from vispress.methods import DivPrune
from vispress_kernels.maxmin_select import maxmin_select

GOLDEN = torch.tensor(
    [
        [1, 0, 0],
        [0.9, 0.1, 0],
        [0, 1, 0],
        [0, 0.9, 0.2],
        [0, 0, 1],
        [0.6, 0.5, 0.4],
        [-0.2, 0.1, 0.9],
        [0.7, -0.1, 0.1],
    ]
)


def order_of(features, num_keep):
    return maxmin_select(features[None], num_keep)[0].tolist()


def kept(features, num_keep):
    return DivPrune().plan(only(features=features[None]), num_keep).keep[0].tolist()


def test_worked_example():
    x = torch.tensor([[1, 0], [0.98, 0.2], [0, 1], [-0.7, 0.7]])
    # nearest distances .0202, .0202, .2929, .2929
    assert order_of(x, 2) == [2, 0]  # tokens 2 and 3 tie for the first pick
    assert kept(x, 2) == [0, 2]


def test_golden_vector():
    assert order_of(GOLDEN, 4) == [5, 6, 2, 7]
    assert kept(GOLDEN, 4) == [2, 5, 6, 7]


def test_length_plays_no_part():
    scaled = GOLDEN * torch.arange(1, 9)[:, None]
    assert order_of(scaled, 6) == order_of(GOLDEN, 6)


def test_equal_tokens_are_picked_once_and_then_in_order():
    g = torch.Generator().manual_seed(0)
    distinct = torch.randn(5, 33, generator=g)
    repeats = torch.arange(45) % 5
    # all distinct ones first, then copies from the front, whatever their rounding
    order = order_of(distinct[repeats], 12)
    assert len({repeats[i].item() for i in order[:5]}) == 5
    assert sorted(order) == sorted(set(order))
    alone = kept(distinct[repeats], 12)
    others = torch.randn(2, 45, 33, generator=g)
    together = torch.stack([others[0], distinct[repeats], others[1]])
    assert DivPrune().plan(only(features=together), 12).keep[1].tolist() == alone


def test_all_tokens_equal():
    assert kept(torch.ones(6, 4), 4) == [0, 1, 2, 3]


def test_a_zero_or_infinite_token_breaks_nothing():
    features = GOLDEN.clone()
    features[3] = 0
    features[6] = float("inf")
    assert len(set(kept(features, 6))) == 6


def test_permuted_tokens_give_the_permuted_set():
    g = torch.Generator().manual_seed(0)
    x, p = torch.randn(30, 8, generator=g), torch.randperm(30, generator=g)
    assert sorted(p[kept(x[p], 9)].tolist()) == kept(x, 9)


def test_published_counts():
    (placement,) = DivPrune(keep_ratio=0.098).placements(32)
    assert placement.budget.resolve(576) == 56


def test_tokens_nearest_to_each_other_tie():
    x = torch.nn.functional.normalize(
        torch.randn(20, 101, 65, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    nearest, partner = (x @ x.mT - 3 * torch.eye(101)).max(dim=2)
    first = nearest.argmin(dim=1)  # the most isolated token, or its only friend
    other = partner.gather(1, first[:, None])[:, 0]
    mutual = partner.gather(1, other[:, None])[:, 0] == first
    earlier = torch.where(mutual, torch.minimum(first, other), first)
    assert maxmin_select(x, 1)[:, 0].tolist() == earlier.tolist()
