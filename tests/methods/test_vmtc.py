"""VMTC: clusters, weights and places, by hand."""

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, merged, only

from vispress.errors import ConfigError
from vispress.methods import VMTC
from vispress.methods._parts.clustering.kmeans import _filled, kmeans
from vispress.methods.vmtc import clustered

# three directions, tokens of any length, out of order
AXES = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 3]])
X = torch.stack([AXES[0], AXES[1], AXES[1] * 4, AXES[2], AXES[0] * 2, AXES[1], AXES[2] * 9])[None]


def groups(label):
    return {tuple((label == c).nonzero().flatten().tolist()) for c in label.unique()}


@pytest.mark.parametrize("seed", range(5))
def test_clusters_go_by_direction(seed):
    assert groups(kmeans(X, 3, seed)[0]) == {(0, 4), (1, 2, 5), (3, 6)}


def test_rounds_move_centres_to_the_mean_direction():
    angles = torch.tensor([0.0, 0.1, 0.2, 1.0, 1.1, 1.2]).double()
    x = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    assert all(groups(kmeans(x, 2, s)[0]) == {(0, 1, 2), (3, 4, 5)} for s in range(8))


def test_no_cluster_is_empty_even_of_equal_tokens():
    for count in (1, 3, 9, 10):
        label = kmeans(torch.ones(2, 10, 4), count, 0)
        assert [len(own.unique()) for own in label] == [count, count]
    label = kmeans(torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(0)), 12, 0)
    assert label.sort(dim=1).values.tolist() == [list(range(12))] * 3


def test_empty_clusters_get_the_farthest_tokens_that_others_can_spare():
    label = torch.tensor([[1, 1, 1, 3, 3, 5], [1, 1, 1, 1, 1, 1]])
    cosine = torch.tensor([[0.9, 0.2, 0.3, 0.1, 0.0, -1.0], [0.5, 0.5, 0.5, 0.5, 0.1, 0.5]])
    # 5 is alone in its cluster, and so is 3 once 4 is gone; of equals the earlier goes
    assert _filled(label, cosine, 6).tolist() == [[1, 2, 4, 3, 0, 5], [2, 3, 4, 5, 0, 1]]
    assert torch.equal(_filled(label, cosine, 6)[:1], _filled(label[:1], cosine[:1], 6))


def test_an_image_gets_the_clusters_it_gets_alone():
    x = torch.randn(3, 30, 5, generator=torch.Generator().manual_seed(1))
    together = kmeans(x, 7, 3)
    assert all(torch.equal(kmeans(x[b : b + 1], 7, 3)[0], together[b]) for b in range(3))


def test_weights_are_attention_over_its_sum_and_the_place_is_in_the_middle():
    # primary: token 3; clusters {0, 4}, {1, 2, 5} and {6}
    a = torch.tensor([[0.1, 0.2, 0.1, 0.9, 0.3, 0.1, 0.0]])
    owner, weight = clustered(a, X, 1, 3, 0)
    # mean places 2 (0 and 4 are as near: the earlier) and 8/3 (2 is nearest)
    assert owner.tolist() == [[0, 2, 2, 3, 0, 2, 6]]
    expected = torch.tensor([[0.25, 0.5, 0.25, 1, 0.75, 0.25, 1]])  # token 6: no attention, alone
    torch.testing.assert_close(weight, expected)


def test_a_cluster_without_attention_is_a_plain_mean():
    _, weight = clustered(torch.zeros(1, 6), X[:, :6], 0, 3, 0)
    torch.testing.assert_close(weight, torch.tensor([[1 / 2, 1 / 3, 1 / 3, 1, 1 / 2, 1 / 3]]))


def test_published_counts_and_what_is_merged():
    tokens = make_tokens(1, 576)
    plan = VMTC().plan(tokens, 216)
    sizes = torch.bincount(plan.assign[0])
    assert plan.keep.shape == (1, 216)
    assert int(sizes.sum()) == 576
    primary = tokens.cls_attention.mean(dim=1)[0].topk(144).indices
    assert set(primary.tolist()) <= set(plan.keep[0].tolist())
    assert bool((sizes[plan.assign[0, primary]] == 1).all())
    assert plan.merge_on == "vision_features"


def test_merged_values_are_means_before_the_projector():
    a = torch.tensor([[0.1, 0.2, 0.1, 0.9, 0.3, 0.1, 0.0]])
    tokens = only(vision_features=X, cls_attention=a[:, None])
    plan = VMTC(cluster_ratio=0.75).plan(tokens, 4)
    assert plan.keep.tolist() == [[0, 2, 3, 6]]
    values = merged(plan, X)[0]
    torch.testing.assert_close(values[0], 0.25 * X[0, 0] + 0.75 * X[0, 4])
    torch.testing.assert_close(values[1], 0.5 * X[0, 1] + 0.25 * X[0, 2] + 0.25 * X[0, 5])


def test_without_clusters_the_rest_is_dropped_and_newlines_stay():
    crops = anyres(side=4, rows=1, cols=2)
    tokens = make_tokens(2, crops=crops)
    plan = VMTC(cluster_ratio=0.0).plan(tokens, 20)
    newlines = (crops.segment < 0).nonzero().flatten().tolist()
    assert all(set(newlines) <= set(keep.tolist()) for keep in plan.keep)
    assert (plan.assign >= 0).sum(dim=1).tolist() == [20, 20]


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"cluster_ratio": 1.5}, {"seed": -1}, {"scores": "max"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            VMTC(**bad)
