"""FasterVLM and VTC-CLS: ranking by encoder attention, alone and by sub-image."""

from dataclasses import replace

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, only, with_scores

from vispress.errors import ConfigError
from vispress.methods import VTCCLS, FasterVLM
from vispress.types import Signal


def test_worked_example():
    tokens = with_scores([0.02, 0.30, 0.01, 0.25, 0.30])
    assert FasterVLM().plan(tokens, 3).keep.tolist() == [[1, 3, 4]]


def test_golden_vector():
    tokens = with_scores([0.20, 0.05, 0.15, 0.02, 0.18, 0.10, 0.12, 0.18])
    assert FasterVLM().plan(tokens, 4).keep.tolist() == [[0, 2, 4, 7]]


def test_heads_are_averaged():
    tokens = only(cls_attention=torch.tensor([[[0.6, 0.1, 0.0], [0.0, 0.6, 0.5]]]))
    assert FasterVLM().plan(tokens, 1).keep.tolist() == [[1]]


def test_layers_are_summed():
    layers = torch.tensor([[0.3, 0.1, 0.2], [0.1, 0.4, 0.2], [0.2, 0.2, 0.3]])
    tokens = only(cls_attention=layers[None, :, None])
    score = VTCCLS().score(tokens)
    torch.testing.assert_close(score, torch.tensor([[0.6, 0.7, 0.7]]))
    # 0.1 + 0.4 + 0.2 and 0.2 + 0.2 + 0.3 tie up to rounding: make the tie exact
    exact = replace(tokens, cls_attention=(10 * tokens.cls_attention).round())
    assert VTCCLS().plan(exact, 1).keep.tolist() == [[1]]


@pytest.mark.parametrize("cls", [FasterVLM, VTCCLS])
def test_column_mean_takes_the_place_of_cls(cls):
    method = cls(scores="column_mean")
    assert Signal.COLUMN_ATTENTION in method.signals()
    assert Signal.CLS_ATTENTION not in method.signals()
    tokens = replace(with_scores([0.1, 0.2, 0.3]), cls_attention=None)
    assert method.plan(tokens, 1).keep.tolist() == [[2]]


@pytest.mark.parametrize(
    ("start", "depth", "feature", "layers"),
    [
        (None, 24, 22, (16, 17, 18, 19, 20, 21, 22)),
        (None, 6, 4, (4,)),
        (None, 3, 1, (1,)),
        (22, 24, 22, (22,)),
        (0, 6, 4, (0, 1, 2, 3, 4)),
        (-5, 8, 6, (3, 4, 5, 6)),
    ],
)
def test_ensemble_layers(start, depth, feature, layers):
    assert VTCCLS(start_layer=start).encoder_layers(depth, feature) == layers


@pytest.mark.parametrize("start", [23, -25])
def test_a_start_outside_the_encoder_is_refused(start):
    with pytest.raises(ConfigError, match=r"start_layer must be in \[0, 22\]"):
        VTCCLS(start_layer=start).encoder_layers(24, 22)


def test_one_layer_is_fastervlm():
    tokens = make_tokens(2, 20)
    assert VTCCLS().encoder_layers(24, 16) == FasterVLM().encoder_layers(24, 16)
    assert torch.equal(VTCCLS().plan(tokens, 6).keep, FasterVLM().plan(tokens, 6).keep)


def test_every_crop_has_its_share_and_newlines_stay():
    crops = anyres(side=4, rows=2, cols=2)
    tokens = make_tokens(1, crops=crops)
    (keep,) = FasterVLM().plan(tokens, 8 + 20).keep  # 8 newlines, 4 of each of 5 sub-images
    kept = crops.segment[keep]
    assert [int((kept == s).sum()) for s in range(-1, 5)] == [8, 4, 4, 4, 4, 4]


def test_newlines_go_when_they_would_eat_the_budget():
    crops = anyres(side=4, rows=2, cols=2)
    (keep,) = FasterVLM().plan(make_tokens(1, crops=crops), 12).keep
    kept = crops.segment[keep]
    assert [int((kept == s).sum()) for s in range(-1, 5)] == [0, 3, 3, 2, 2, 2]


def test_video_frames_have_equal_shares():
    tokens = make_tokens(2, grid=(3, 2, 4))
    keep = FasterVLM().plan(tokens, 9).keep
    assert torch.equal(torch.bincount((keep // 8).flatten(), minlength=3), torch.tensor([6, 6, 6]))


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("cls", "bad"),
    [
        (FasterVLM, {"scores": "mean"}),
        (VTCCLS, {"scores": 1}),
        (VTCCLS, {"start_layer": 1.5}),
        (VTCCLS, {"start_layer": True}),
    ],
)
def test_bad_hyper_parameters_are_refused(cls, bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        cls(**bad)
