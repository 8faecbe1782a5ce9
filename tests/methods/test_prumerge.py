"""PruMerge: outliers, steps and sums, by hand."""

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, only

from vispress.errors import ConfigError
from vispress.methods import PruMerge
from vispress.methods.prumerge import add_neighbours, equal_steps, outliers


def test_outliers_lie_above_the_upper_fence():
    # quartiles 1.75 and 3.25 of 1, 2, 3, 4; fence 5.5
    assert outliers(torch.tensor([1.0, 2, 3, 4])) == 0
    # quartiles 2 and 4 of 1, 2, 3, 4, x: fence 7
    assert outliers(torch.tensor([1.0, 2, 3, 4, 7])) == 0
    assert outliers(torch.tensor([1.0, 2, 3, 4, 7.1])) == 1


@pytest.mark.parametrize(("count", "step"), [(13, 14), (33, 5), (96, 2), (400, 1)])
def test_published_steps(count, step):
    places = equal_steps(576, count / 576, "cpu")
    assert torch.equal(places, torch.arange(0, 575, step))


def test_a_kept_token_gains_the_weighted_sum_of_its_nearest():
    x = torch.tensor([[[1.0, 0], [0, 1], [2, 2], [0, 4]]])
    keys = torch.tensor([[[1.0, 0], [0.9, 0.1], [0, 1], [-1, 0]]])
    a = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    kept, rest = add_neighbours(torch.tensor([[0, 2]]), a, keys, x, 1)
    # 0 is nearest to 1: (1, 0) + .3 (0, 1); 2 is nearest to 1, too: (2, 2) + .3 (0, 1)
    torch.testing.assert_close(kept[0], torch.tensor([[1, 0.3], [2, 2.3]]))
    # the rest: .3 (0, 1) + .1 (0, 4)
    torch.testing.assert_close(rest[0], torch.tensor([0, 0.7]))


def test_many_kept_tokens_are_compared_in_blocks(monkeypatch):
    g = torch.Generator().manual_seed(0)
    a, keys, x = (torch.randn(2, 60, *shape, generator=g) for shape in ((), (5,), (4,)))
    order = torch.stack([torch.randperm(60, generator=g)[:23] for _ in range(2)])
    kept, rest = add_neighbours(order, a, keys, x, 8)
    monkeypatch.setattr("vispress.methods.prumerge.MOST_PAIRS", 7 * 60)
    in_blocks, same_rest = add_neighbours(order, a, keys, x, 8)
    torch.testing.assert_close(in_blocks, kept)
    assert torch.equal(same_rest, rest)
    assert add_neighbours(order[:, :0], a, keys, x, 8)[0].shape == (2, 0, 4)


def test_each_image_decides_its_own_count():
    a = torch.ones(2, 20) / 40 + torch.arange(20) / 1e4
    a[0, [3, 8]], a[1, 5] = 0.5, 0.4
    tokens = make_tokens(2, 20)
    tokens.cls_wide_attention[:, 0] = a
    plan = PruMerge().plan(tokens, 20)
    # the extra token stands at the last free place
    assert [keep.tolist() for keep in plan.keep] == [[3, 8, 19], [5, 19]]
    assert PruMerge().placements(32)[0].adaptive
    assert not PruMerge(keep_ratio=0.5).placements(32)[0].adaptive


@pytest.mark.parametrize("plus", [False, True])
def test_without_outliers_there_is_still_a_token(plus):
    flat = torch.full((1, 1, 9), 0.1)
    x = torch.ones(1, 9, 2)
    tokens = only(
        vision_features=x,
        cls_wide_attention=flat,
        vision_keys=x[:, None],
        projector=lambda values: values,
    )
    plan = PruMerge(plus=plus).plan(tokens, 9)
    assert plan.counts == ((4,) if plus else (1,))  # at 0, 3, 6 and the sum of the rest


@pytest.mark.parametrize("plus", [False, True])
def test_a_budget_is_met(plus):
    tokens = make_tokens(2, 60)
    plan = PruMerge(num_tokens=13, plus=plus).plan(tokens, 13)
    assert plan.counts == (13, 13)
    top = tokens.cls_wide_attention[:, 0].topk(6 if plus else 12).indices
    assert all(set(top[b].tolist()) <= set(plan.keep[b].tolist()) for b in range(2))


def test_newlines_stay_themselves():
    crops = anyres(side=4, rows=2, cols=1)
    tokens = make_tokens(1, crops=crops)
    newline = torch.where(crops.segment < 0)[0]
    plan = PruMerge(num_tokens=20).plan(tokens, 20)
    slots = torch.searchsorted(plan.keep[0], newline)
    assert torch.equal(plan.keep[0][slots], newline)
    torch.testing.assert_close(plan.features[0, slots], tokens.features[0, newline])


def test_attention_is_read_from_the_last_encoder_layer():
    assert PruMerge().encoder_layers(24, 22) == (23,)


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"plus": 1}, {"neighbours": 0}, {"scores": "max"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            PruMerge(**bad)
