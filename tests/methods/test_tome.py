"""ToMe: the worked example of the specification, its schedule, and what is left for the LLM."""

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, only

from vispress.errors import ConfigError
from vispress.methods import ToMe
from vispress.methods._parts.clustering.bipartite import fold, match
from vispress.methods.tome import dense, first_members, owners
from vispress.types import Stage
from vispress_kernels.merge_tokens import merge_tokens

V = torch.tensor(
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
)[None]
EIGHT = torch.tensor([8])


def test_worked_example():
    cosine, nearest = match(V, EIGHT)
    assert cosine[0].argsort(descending=True)[:2].tolist() == [0, 1]
    assert nearest[0, :2].tolist() == [0, 1]  # tokens 0 -> 1, 2 -> 3
    places = fold(cosine, nearest, EIGHT, torch.tensor([2]), 8, in_order=False)
    out = merge_tokens(V, places, 6, reduce="mean")
    rows = [[0, 0, 1], [-0.2, 0.1, 0.9], [0.95, 0.05, 0], [0, 0.95, 0.1]]
    rows += [[0.6, 0.5, 0.4], [0.7, -0.1, 0.1]]
    torch.testing.assert_close(out[0], torch.tensor(rows))
    assert places[0].bincount().tolist() == [1, 1, 2, 2, 1, 1]


def test_rows_of_unequal_length_are_what_they_are_alone():
    g = torch.Generator().manual_seed(0)
    metric, counts, merges = torch.randn(3, 9, 5, generator=g), [9, 4, 1], [3, 2, 0]
    edges = match(metric, torch.tensor(counts))
    together = fold(*edges, torch.tensor(counts), torch.tensor(merges), 9, in_order=False)
    for row, (n, r) in enumerate(zip(counts, merges, strict=True)):
        assert together[row, n:].tolist() == [-1] * (9 - n)
        if n > 1:
            own = torch.tensor([n])
            alone = match(metric[row : row + 1, :n], own)
            expected = fold(*alone, own, torch.tensor([r]), n, in_order=False)
            assert torch.equal(together[row, :n], expected[0])
        assert sorted(set(together[row, :n].tolist())) == list(range(n - r))


@pytest.mark.parametrize("n", [2, 7, 8])
@pytest.mark.parametrize("cls", [False, True])
def test_rows_of_one_length_need_no_count(n, cls):
    metric = torch.randn(3, n, 5, generator=torch.Generator().manual_seed(n))
    count, merges = torch.full((3,), n), (n - cls) // 2
    told = match(metric, count, protect_first=cls)
    edges = match(metric, None, protect_first=cls)
    assert all(map(torch.equal, told, edges))
    expected = fold(*told, count, torch.full((3,), merges), n, in_order=cls)
    assert torch.equal(fold(*edges, None, merges, n, in_order=cls), expected)
    assert expected.amax(dim=1).tolist() == [n - merges - 1] * 3


@pytest.mark.parametrize("cls", [False, True])
def test_ties_merge_the_earlier_token(cls):
    metric, count = torch.ones(1, 7, 3), torch.tensor([7])
    places = fold(
        *match(metric, count, protect_first=cls), count, torch.tensor([2]), 7, in_order=cls
    )
    # even tokens 0 2 4 6; all look at token 1, and [CLS] joins none
    expected = [0, 2, 2, 3, 2, 4, 1] if cls else [2, 2, 2, 3, 0, 4, 1]
    assert places[0].tolist() == expected


def test_a_key_that_is_no_number_is_merged_last():
    metric = V.clone()
    metric[0, 0] = float("nan")
    cosine, nearest = match(metric, EIGHT)
    assert cosine[0, 0] == float("-inf") or cosine[0, 0].isnan()
    places = fold(cosine, nearest, EIGHT, torch.tensor([3]), 8, in_order=False)
    assert (places == places[0, 0]).sum() == 1


@pytest.mark.parametrize(
    ("size", "keep", "layers", "expected"),
    [
        (576, 208, 23, [16] * 23),
        (576, 64, 23, [23] * 22 + [6]),
        (576, 576, 23, [0] * 23),
        (
            36,
            1,
            3,
            [12, 12, 6],
        ),  # half of what is left at most: the rest is for the LLM's placement
        (1, 1, 4, [0] * 4),
    ],
)
def test_layers_share_the_merges_and_the_last_is_corrected(size, keep, layers, expected):
    counts = ToMe(num_tokens=keep).merges_per_layer(size, keep, layers)
    assert list(counts) == expected
    assert size - sum(counts) >= keep


@pytest.mark.parametrize("inflect", [-1.0, -0.5, 0.3, 1.0])
def test_an_inflected_schedule_ends_at_the_same_count(inflect):
    counts = ToMe(num_tokens=96, inflect=inflect).merges_per_layer(576, 96, 23)
    assert sum(counts) == 480
    assert (counts[0] > counts[-2]) == (inflect < 0)


def test_placements_are_the_encoder_and_one_token_a_group():
    inside, before = ToMe(num_tokens=64).placements(32)
    assert (inside.stage, before.stage) == (Stage.ENCODER, Stage.PRE_LLM)
    assert inside.budget.resolve(576) == before.budget.resolve(576) == 64
    inside, before = ToMe(num_tokens=64, restore=True).placements(32)
    assert (inside.budget.resolve(576), before.budget.resolve(576)) == (64, 576)


@pytest.mark.refusal
@pytest.mark.parametrize("bad", [{"inflect": 1.5}, {"inflect": "up"}, {"restore": 1}])
def test_bad_hyper_parameters_are_named(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        ToMe(num_tokens=8, **bad)


def test_groups_are_named_by_their_first_members():
    groups = torch.tensor([[7, -3, 7, 2, -3, 9]])
    assert first_members(groups)[0].tolist() == [0, 1, 0, 3, 1, 5]
    place, count = dense(groups)
    assert place[0].tolist() == [0, 1, 0, 2, 1, 3]
    assert count.tolist() == [4]


def bucket(groups, features):
    return only(features=features, encoder_groups=groups)


def test_as_many_groups_as_asked_keep_their_first_members():
    groups = torch.tensor([[5, 5, 1, 5, 1, 0, 0, 2]])
    plan = ToMe(num_tokens=4).plan(bucket(groups, V), 4)
    assert plan.keep[0].tolist() == [0, 2, 5, 7]
    assert plan.assign[0].tolist() == [0, 0, 1, 0, 1, 2, 2, 3]
    torch.testing.assert_close(
        plan.weight[0], torch.tensor([1 / 3, 1 / 3, 1 / 2, 1 / 3, 1 / 2, 1 / 2, 1 / 2, 1])
    )


def test_too_many_groups_are_merged_by_the_same_rule():
    plan = ToMe(num_tokens=6).plan(bucket(torch.arange(8)[None], V), 6)
    # 0 joins 1 and 2 joins 3, each at its group's first place
    assert plan.keep[0].tolist() == [0, 2, 4, 5, 6, 7]
    assert plan.assign[0].tolist() == [0, 0, 1, 1, 2, 3, 4, 5]
    # and in several rounds, as half of them can go in one
    assert owners(V, torch.arange(8)[None], 1, "torch")[0].tolist() == [0] * 8


def test_too_few_groups_are_filled_up_with_copies():
    groups = torch.tensor([[5, 5, 1, 5, 1, 5, 5, 5]])
    plan = ToMe(num_tokens=4).plan(bucket(groups, V), 4)
    assert plan.keep[0].tolist() == [0, 1, 2, 3]
    assert plan.assign[0].tolist() == [0, 1, 2, 3, 2, 0, 0, 0]


def test_crops_are_merged_each_by_itself_and_newlines_stay():
    crops = anyres(4, 2, 2)
    tokens = make_tokens(crops=crops)
    num_keep = 30
    plan = ToMe(num_tokens=num_keep).plan(tokens, num_keep)
    segment = crops.segment
    newlines = (segment < 0).nonzero()[:, 0]
    for keep, assign in zip(plan.keep, plan.assign, strict=True):
        assert set(newlines.tolist()) <= set(keep.tolist())
        owner = keep[assign]
        assert torch.equal(segment[owner], segment)
        assert torch.equal(owner[newlines], newlines)
