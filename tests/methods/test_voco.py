"""VoCo: what it hides, and that it keeps every token in the prefill."""

import pytest
import torch
from tests.methods.helpers import make_tokens

from vispress.errors import BudgetError, ConfigError
from vispress.methods import VoCo
from vispress.types import Placement, Stage


def test_the_image_runs_through_the_prefill_and_nothing_of_it_stays_cached() -> None:
    (placement,) = VoCo().placements(32)
    assert isinstance(placement, Placement)
    assert (placement.stage, placement.layer) == (Stage.CACHE, 0)
    assert placement.budget.resolve(576) == 0
    tokens = make_tokens(grid=(1, 2, 3))
    assert VoCo().plan(tokens, 6).keep.tolist() == [list(range(6))] * 2


def test_what_is_hidden_and_which_word_stands_for_images() -> None:
    assert VoCo().gist_evictor() == VoCo()
    assert (VoCo().gist_token, VoCo().evicts_prefix) == (None, False)
    released = VoCo(token_id=32000, hide="prefix")
    assert (released.gist_token, released.evicts_prefix) == (32000, True)


@pytest.mark.refusal
def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="hide must be one of 'visual', 'prefix', got 'text'"):
        VoCo(hide="text")
    with pytest.raises(ConfigError, match=r"token_id must be an integer >= 0, got -1"):
        VoCo(token_id=-1)
    with pytest.raises(BudgetError, match="voco takes no keep_ratio"):
        VoCo(keep_ratio=0.5)
    with pytest.raises(ConfigError, match="token_id"):
        VoCo(token_id=torch.tensor(3))  # type: ignore[arg-type]
