"""VScan: windows, two stages and merging, by hand."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, merged

from vispress.errors import BudgetError, ConfigError
from vispress.methods import VScan
from vispress.methods._parts.clustering.owners import mean_plan
from vispress.methods._parts.geometry.windows import scan, windows
from vispress.methods.base import top_indices
from vispress.types import Queries, Stage


def early(**sizes):
    return replace(make_tokens(encoder_layers=2, **sizes), query_attention=None)


def test_windows_of_a_picture_and_of_crops():
    ours = windows(early(grid=(1, 24, 24), batch=1)).view(24, 24)
    assert ours[::6, ::6].flatten().tolist() == list(range(16))
    assert all(len(w.unique()) == 1 for row in ours.split(6) for w in row.split(6, dim=1))
    crops = anyres(side=4, rows=2, cols=1)
    (found,) = windows(early(crops=crops, batch=1))
    assert torch.equal(found < 0, crops.segment < 0)
    assert found[crops.segment == 1].tolist() == list(range(16))


def test_half_is_local_and_equal_a_window_the_rest_global():
    window = torch.arange(16).repeat_interleave(4)[None]
    local = torch.arange(64).flip(0)[None].float() % 4  # the first of each window
    whole = torch.zeros(1, 64)
    whole[0, 17:20] = 1.0
    keep = scan(local, whole, window, 38)
    # one a window (19 // 16), the three loud ones, and the earliest of the equals
    first = list(range(3, 64, 4)) if local[0, 3] > local[0, 0] else list(range(0, 64, 4))
    assert set(first) <= set(keep[0].tolist())
    assert {17, 18, 19} <= set(keep[0].tolist())
    assert len(keep[0].unique()) == 38


def test_counts_that_the_official_code_loses_are_kept():
    # 58: one a window instead of 29 / 16, the rest (official: 29, in all 45) is global
    tokens = early(grid=(1, 24, 24), batch=1)
    assert VScan().plan(tokens, 58).counts == (58,)


def test_dropped_tokens_are_averaged_into_their_owner():
    plan = mean_plan(torch.tensor([[0, 2, 2, 0, 2, -1]]), [2])
    x = torch.tensor([[[1.0], [2], [3], [5], [7], [9]]])
    assert plan.keep.tolist() == [[0, 2]]
    assert merged(plan, x).tolist() == [[[3.0], [4.0]]]


def test_the_owner_is_the_most_similar_kept_token():
    tokens = early(grid=(1, 8, 8), batch=2)
    plan = VScan().plan(tokens, 20)
    x = torch.nn.functional.normalize(tokens.features, dim=-1)
    for b in range(2):
        nearest = (x[b] @ x[b, plan.keep[b]].mT).argmax(dim=1)
        assert torch.equal(plan.assign[b], nearest)


def test_the_second_stage_ranks_by_the_last_prompt_token():
    tokens = make_tokens(2, 30)
    plan = VScan().plan(tokens, 9)
    assert torch.equal(plan.keep, top_indices(tokens.query_attention.mean(dim=(1, 2)), 9))
    assert plan.assign is None


def test_published_counts_and_layers():
    first, second = VScan(num_tokens=32).placements(32)
    assert (first.stage, first.budget.resolve(576)) == (Stage.PRE_LLM, 96)
    assert (second.layer, second.budget.resolve(576)) == (16, 32)
    assert (second.queries, second.attention_of) == (Queries.LAST, "next")
    first, second = VScan(keep_ratio=1 / 9).placements(32)
    assert (first.budget.resolve(576), second.budget.resolve(576)) == (96, 32)
    assert VScan().encoder_layers(24, 22) == (5, 22)


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"layer": 0}, {"shallow": -1}, {"scores": "max"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            VScan(**bad)
    with pytest.raises(BudgetError, match="cannot be reached"):
        VScan(keep_ratio=0.2, layer=30).placements(32)
