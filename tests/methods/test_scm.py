"""SCM: what is kept of crops and of plain pictures, by hand."""

import pytest
import torch
from tests.methods.helpers import anyres, only

from vispress.errors import BudgetError, ConfigError
from vispress.methods import SCM
from vispress.types import Queries, Signal, Stage

CROPS = anyres(2, 1, 1)
"""Thumbnail 0 to 3, then two rows of two with a newline each: 4 5 N6, 7 8 N9."""


def kept(scores, num_keep, crops=None):
    tokens = only(mean_attention=torch.tensor([scores]), crops=crops)
    return SCM().plan(tokens, num_keep).keep[0].tolist()


def test_detail_most_attended_stays_in_order():
    assert kept([0.2, 0.5, 0.1, 0.4], 2) == [1, 3]
    assert kept([0.3, 0.3, float("nan"), 0.3], 2) == [0, 1]


def test_the_thumbnail_is_kept_before_the_crops():
    #         thumbnail               4    5    N    7    8    N
    scores = [0.01, 0.04, 0.03, 0.02, 0.5, 0.7, 0.9, 0.6, 0.8, 0.0]
    assert kept(scores, 8, CROPS) == [0, 1, 2, 3, 5, 6, 8, 9]
    assert kept(scores, 7, CROPS) == [0, 1, 2, 3, 6, 8, 9]
    # no room for newlines and detail: detail
    assert kept(scores, 6, CROPS) == [0, 1, 2, 3, 5, 8]
    assert kept(scores, 4, CROPS) == [0, 1, 2, 3]
    assert kept(scores, 2, CROPS) == [1, 2]


def test_frames_of_a_video_have_no_thumbnail():
    from dataclasses import replace

    scores = [0.01, 0.04, 0.03, 0.02, 0.5, 0.7, 0.9, 0.6, 0.8, 0.0]
    assert kept(scores, 5, replace(CROPS, thumbnail=False)) == [5, 6, 7, 8, 9]


def test_small_scores_of_a_thumbnail_are_told_apart():
    scores = [1e-8, 3e-8, 2e-8, 0.0, *[0.5] * 6]
    assert kept(scores, 2, CROPS) == [1, 2]


def test_one_probe_before_the_llm():
    (placement,) = SCM(keep_ratio=0.5).placements(24)
    assert (placement.stage, placement.probe, placement.queries) == (
        Stage.PRE_LLM,
        1,
        Queries.AFTER,
    )
    # int(0.5 N), as the code counts
    assert [placement.budget.resolve(n) for n in (1536, 1537, 7)] == [768, 768, 3]
    assert SCM(keep_ratio=0.5, probe_layers=4).placements(24)[0].probe == 3
    assert SCM().default_positions == "compact"
    assert Signal.QUERY_ATTENTION not in SCM().signals()


@pytest.mark.refusal
@pytest.mark.parametrize("bad", [0, -1, True, 2.0])
def test_bad_counts_of_layers_are_refused(bad):
    with pytest.raises(ConfigError, match="probe_layers"):
        SCM(probe_layers=bad)


@pytest.mark.refusal
def test_more_layers_than_there_are_and_no_budget_are_refused():
    with pytest.raises(ConfigError, match="at most the LLM's 4 decoder layers, got 5"):
        SCM(keep_ratio=0.5, probe_layers=5).placements(4)
    with pytest.raises(BudgetError, match="scm needs a budget"):
        SCM().placements(4)
