"""Quadtree merge: cells, means and budgets, by hand."""

import pytest
import torch
from tests.methods.helpers import make_tokens, merged, only

from vispress.errors import ConfigError
from vispress.methods import QuadtreeMerge
from vispress.methods._parts.geometry.quadtree import average_linkage, tree_of
from vispress.types import VisualTokens, full_index

A, B = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


def picture(rows) -> VisualTokens:
    """Tokens of a drawing: `a` and `b` are orthogonal, `c` is at 0.2 from `a`."""
    colours = {"a": A, "b": B, "c": torch.tensor([0.8, 0.6])}
    x = torch.stack([colours[letter] for row in rows for letter in row])[None]
    index = full_index(1, x.shape[1], torch.device("cpu"))
    grid = (1, len(rows), len(rows[0]))
    return VisualTokens(features=x, index=index, num_original=x.shape[1], grid=grid)


def cells(plan):
    """Members of each kept token, by its place."""
    places = plan.keep[0].tolist()
    return {p: (plan.assign[0] == i).nonzero().flatten().tolist() for i, p in enumerate(places)}


def test_alike_cells_merge_and_others_stay():
    plan = QuadtreeMerge().plan(picture(["aaab", "aabb", "bbaa", "bbaa"]), 16)
    # three cells of one colour; the mixed one stays, and so does the root
    assert cells(plan) == {
        0: [0, 1, 4, 5],
        2: [2],
        3: [3],
        6: [6],
        7: [7],
        8: [8, 9, 12, 13],
        10: [10, 11, 14, 15],
    }


def test_merging_is_recursive_up_to_the_depth():
    tokens = picture(["aaaa"] * 4)
    assert cells(QuadtreeMerge().plan(tokens, 16)) == {0: list(range(16))}
    assert QuadtreeMerge(max_depth=1).plan(tokens, 16).keep[0].tolist() == [0, 2, 8, 10]


def test_a_cell_of_alike_means_with_unlike_parts_stays():
    # each quarter is half a, half b: their means are equal, but no quarter is alike in itself
    plan = QuadtreeMerge().plan(picture(["abab"] * 4), 16)
    assert plan.keep[0].tolist() == list(range(16))


def test_the_threshold_is_on_the_largest_distance():
    tokens = picture(["ac", "aa"])
    assert QuadtreeMerge(theta=0.1).plan(tokens, 4).counts == (4,)
    assert QuadtreeMerge(theta=0.201).plan(tokens, 4).counts == (1,)


def test_odd_edges_keep_their_tokens_and_means_are_of_parts():
    tokens = picture(["aaa", "aaa", "aaa"])
    assert tree_of((3, 3)).children.tolist() == [4, 2, 2, 1, 4]
    plan = QuadtreeMerge().plan(tokens, 9)
    weights = [1 / 16, 1 / 16, 1 / 8, 1 / 16, 1 / 16, 1 / 8, 1 / 8, 1 / 8, 1 / 4]
    torch.testing.assert_close(plan.weight, torch.tensor([weights]))
    x = torch.arange(18.0).view(1, 9, 2)
    torch.testing.assert_close(merged(plan, x), (plan.weight[..., None] * x).sum(1, keepdim=True))


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 6, 7, 30, 35])
def test_a_budget_is_met_to_two_tokens(num_tokens):
    plan = QuadtreeMerge(num_tokens=num_tokens).plan(make_tokens(3, grid=(1, 6, 6)), num_tokens)
    assert all(max(1, num_tokens - 2) <= count <= num_tokens for count in plan.counts)
    sums = [merged_sum(plan, b) for b in range(3)]
    assert all(torch.allclose(s, torch.ones_like(s)) for s in sums)


def merged_sum(plan, b):
    """Weights of each slot, which add up to 1."""
    count = len(plan.keep[b])
    return torch.zeros(count).index_add(0, plan.assign[b], plan.weight[b])


def test_a_budget_merges_what_costs_least():
    plan = QuadtreeMerge(num_tokens=13).plan(picture(["abaa", "baac", "abba", "baab"]), 13)
    assert cells(plan)[2] == [2, 3, 6, 7]  # a distance of 0.2, the others 1
    assert len(cells(plan)) == 13


def test_without_a_budget_the_image_decides():
    x = torch.stack([A.expand(16, 2), torch.stack([A, B] * 8)])
    plan = QuadtreeMerge().plan(only(features=x, grid=(1, 4, 4)), 16)
    assert plan.counts == (1, 16)
    (placement,) = QuadtreeMerge().placements(32)
    assert placement.adaptive
    assert not QuadtreeMerge(num_tokens=3).placements(32)[0].adaptive


def test_average_linkage_merges_some_parts_of_a_cell():
    plan = QuadtreeMerge(linkage="average").plan(picture(["ac", "aa"]), 4)
    assert cells(plan) == {0: [0, 2, 3], 1: [1]}
    torch.testing.assert_close(plan.weight, torch.tensor([[1 / 3, 1, 1 / 3, 1 / 3]]))
    # two pairs; a cell in parts is none that could merge further, those of one part are
    plan = QuadtreeMerge(linkage="average").plan(picture(["abaa", "abaa", "aabb", "aaaa"]), 16)
    assert cells(plan) == {
        0: [0, 4],
        1: [1, 5],
        2: [2, 3, 6, 7, 8, 9, 12, 13],
        10: [10, 11],
        14: [14, 15],
    }
    torch.testing.assert_close(plan.weight[0, [2, 8]], torch.tensor([1 / 8, 1 / 8]))
    plan = QuadtreeMerge(linkage="average", max_depth=1).plan(picture(["aaaa"] * 2), 8)
    assert plan.keep.tolist() == [[0, 2]]


def test_linkage_is_by_means_of_pairs():
    # on a line at 0, 1, 2.2: 2.2 is 1.2 from its nearest, 1.7 from both on average
    x = torch.tensor([0.0, 1.0, 2.2])
    distance = (x[:, None] - x).abs()
    assert average_linkage(distance, 1.5).tolist() == [0, 0, 2]
    assert average_linkage(distance, 1.71).tolist() == [0, 0, 0]
    assert average_linkage(distance, 0.9).tolist() == [0, 1, 2]
    assert average_linkage(distance, 9.0, torch.tensor([True, False, True])).tolist() == [0, 1, 0]


def test_average_linkage_of_odd_edges():
    plan = QuadtreeMerge(linkage="average").plan(picture(["aaa", "aaa", "aaa"]), 9)
    weights = [1 / 16, 1 / 16, 1 / 8, 1 / 16, 1 / 16, 1 / 8, 1 / 8, 1 / 8, 1 / 4]
    torch.testing.assert_close(plan.weight, torch.tensor([weights]))


@pytest.mark.refusal
def test_average_linkage_takes_no_budget():
    with pytest.raises(ConfigError, match="linkage='average' takes no budget"):
        QuadtreeMerge(linkage="average", num_tokens=4)


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"theta": 2.1}, {"max_depth": 0}, {"linkage": "single"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            QuadtreeMerge(**bad)
