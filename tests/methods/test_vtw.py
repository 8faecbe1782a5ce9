"""VTW: everything up to a layer, nothing from there on."""

import pytest
from tests.methods.helpers import make_tokens

from vispress.errors import ConfigError
from vispress.methods import VTW
from vispress.types import Stage


def test_all_tokens_leave_before_the_published_layer():
    (placement,) = VTW().placements(32)
    assert (placement.layer, placement.budget.resolve(576)) == (15, 0)
    assert [VTW().placements(n)[0].layer for n in (2, 6, 28, 40)] == [1, 3, 13, 19]
    assert VTW(layer=5).placements(6)[0].layer == 5
    (whole,) = VTW(layer=0).placements(6)
    assert (whole.stage, whole.layer) == (Stage.PRE_LLM, 0)
    assert VTW().plan(make_tokens(3, 9), 0).keep.shape == (3, 0)


@pytest.mark.refusal
def test_layers_out_of_range_are_refused():
    for layer in (-1, 6):
        with pytest.raises(ConfigError, match="layer"):
            VTW(layer=layer).placements(6)
