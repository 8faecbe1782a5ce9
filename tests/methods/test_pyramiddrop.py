"""PyramidDrop: whose attention ranks the tokens (its schedule: `test_schedules.py`)."""

from tests.methods.helpers import with_scores

from vispress.methods import PyramidDrop
from vispress.types import Queries, Stage


def test_each_stage_asks_for_the_last_row_of_the_next_layer():
    for placement in PyramidDrop().placements(32):
        assert placement.stage is Stage.IN_LLM
        assert (placement.queries, placement.attention_of) == (Queries.ENDS, "next")
    assert PyramidDrop.default_positions == "compact"


def test_keeps_the_most_attended_in_original_order():
    tokens = with_scores([0.2, 0.5, 0.1, 0.4], [0.3, 0.0, 0.3, 0.3])
    assert PyramidDrop().plan(tokens, 2).keep.tolist() == [[1, 3], [0, 2]]
