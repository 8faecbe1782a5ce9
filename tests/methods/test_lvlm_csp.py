"""LVLM_CSP: representatives, the last stage and budgets, by hand."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import make_tokens, with_scores

from vispress.errors import BudgetError, ConfigError, UnsupportedMethodError
from vispress.methods import LVLMCSP
from vispress.types import Queries, Stage


def entering(**sizes):
    return replace(make_tokens(**sizes), query_attention=None)


def test_uniform_representatives_stand_at_whole_steps():
    # 10 // 4 = 2: the last places are never reached, as in the paper's rule
    assert LVLMCSP().plan(entering(batch=2, num_visual=10), 4).keep.tolist() == [[0, 2, 4, 6]] * 2
    assert LVLMCSP().plan(entering(batch=1, num_visual=7), 5).keep.tolist() == [[0, 1, 2, 3, 4]]


def test_random_representatives_hang_on_the_seed_alone():
    tokens = entering(batch=3, num_visual=40)
    one, two = (LVLMCSP(representatives="random", seed=s).plan(tokens, 9).keep for s in (1, 2))
    assert torch.equal(one, LVLMCSP(representatives="random", seed=1).plan(tokens, 9).keep)
    assert one.tolist() != two.tolist()
    assert len(one[0].unique()) == 9


def test_representatives_by_cls_are_the_most_attended():
    tokens = replace(with_scores([0.2, 0.5, 0.1, 0.4]), query_attention=None)
    assert LVLMCSP(representatives="cls").plan(tokens, 2).keep.tolist() == [[1, 3]]


def test_the_last_stage_ranks_by_the_last_prompt_token():
    tokens = with_scores([0.2, 0.5, 0.1, 0.5])
    assert LVLMCSP().plan(tokens, 1).keep.tolist() == [[1]]
    assert LVLMCSP().plan(tokens, 3).keep.tolist() == [[0, 1, 3]]


def test_published_operating_point():
    first, last = LVLMCSP().placements(32)
    assert (first.stage, first.until, first.budget.resolve(576)) == (Stage.SKIP, 8, 72)
    assert (last.layer, last.until, last.budget.resolve(576)) == (16, None, 72)
    assert (last.queries, last.attention_of) == (Queries.LAST, "previous")
    mean = (8 * 72 + 8 * 576 + 16 * 72) / (32 * 576)
    assert mean == pytest.approx(0.344, abs=5e-4)
    assert LVLMCSP(keep_ratio=mean).placements(32)[0].budget.resolve(576) == 72


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"layers": (8, 8)}, {"layers": (4,)}, {"seed": -1}, {"representatives": "seg"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            LVLMCSP(**bad)
    with pytest.raises(BudgetError, match="cannot be reached"):
        LVLMCSP(keep_ratio=0.25).placements(32)


@pytest.mark.refusal
def test_representatives_by_cls_need_a_cls_token():
    from tests.laws.cases import model_of

    from vispress import compress_model

    with pytest.raises(UnsupportedMethodError, match="lvlm_csp needs cls_attention"):
        compress_model(model_of("qwen2_vl"), LVLMCSP(representatives="cls"))
