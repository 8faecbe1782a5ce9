"""VTW: everything up to a layer, nothing from there on."""

import pytest
from tests.methods.helpers import make_tokens

from vispress.errors import ConfigError
from vispress.methods import VTW


def test_all_tokens_leave_at_half_of_the_depth():
    (placement,) = VTW().placements(32)
    assert (placement.layer, placement.budget.resolve(576)) == (16, 0)
    assert VTW().placements(6)[0].layer == 3
    assert VTW(layer=5).placements(6)[0].layer == 5
    assert VTW().plan(make_tokens(3, 9), 0).keep.shape == (3, 0)


@pytest.mark.refusal
def test_layers_out_of_range_are_refused():
    for layer in (0, 6):
        with pytest.raises(ConfigError, match="layer"):
            VTW(layer=layer).placements(6)
