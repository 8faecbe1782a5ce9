"""What a cell changes, and what cells may share."""

import pytest

from vispress.bench.plan.cells import Cell, cells_of
from vispress.bench.run.applied_cell import changes_encoder, check_cell
from vispress.bench.run.budget_check import expected_counts
from vispress.config import make_compressor
from vispress.errors import UnsupportedMethodError
from vispress.registry import get_method, list_methods
from vispress.types import Stage


def cell(*methods):
    chain = tuple(
        make_compressor(name, **({"keep_ratio": 0.5} if get_method(name).takes_budget else {}))
        for name in methods
    )
    return Cell(group="-".join(methods), chain=chain)


@pytest.mark.parametrize("method", list_methods())
def test_cells_that_merge_in_the_encoder_get_no_features_of_another_one(method):
    (compressor,) = cell(method).chain
    inside = any(p.stage is Stage.ENCODER for p in compressor.placements(32))
    assert changes_encoder(cell(method)) == inside == (method in ("pvc", "tome"))


def test_one_method_of_a_chain_is_enough():
    assert changes_encoder(cell("tome", "divprune", "fastv"))
    assert not changes_encoder(cell("divprune", "fastv"))
    assert not changes_encoder(Cell(group="none"))
    (smaller,) = cells_of({"method": "downsample"}, (0.5,), "placement")
    assert changes_encoder(smaller)


def test_targets_are_the_llms_and_not_the_encoders():
    assert expected_counts(cell("tome", "divprune").chain, 16, 4) == [8, 4]
    restored = (make_compressor("tome", keep_ratio=0.5, restore=True),)
    assert expected_counts(restored, 16, 4) == [16]


@pytest.mark.parametrize("method", ["holitom", "prunevid"])
def test_methods_for_videos_are_not_run_on_pictures(method):
    # a model that reads videos accepts them, and they would keep every token of a picture
    with pytest.raises(UnsupportedMethodError, match=f"{method} is made for videos"):
        check_cell(cell(method), None, None, pictures=["count"])
