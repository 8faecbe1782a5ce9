"""Law 5: placeholders under `attention_mask` 0 are not there, and text around them survives.

Collators append a masked dummy image to text-only samples, so that every rank runs the encoder.
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar, final

import pytest
import torch
from tests.laws.cases import (
    CASES,
    QWEN,
    SAMPLES,
    cases,
    exact,
    greedy,
    inputs_of,
    logits_of,
    make,
    model_of,
    real_positions,
    settings,
)
from tests.laws.packing import Packed, pack
from tests.laws.test_law12_documents import kept_of
from tests.tiny import NEWER, Image, Sample, Text, cache_by_prompts, visual_positions
from torch import Tensor

from vispress import compressed
from vispress.budget import Budget
from vispress.errors import UnsupportedMethodError
from vispress.methods.base import Compressor
from vispress.types import Placement, Positions, Stage, TokenPlan, VisualTokens

DUMMY = 3
WITH_DUMMIES = (
    *SAMPLES,
    Sample([Image(4, 4)]),
    Sample([Image(4, 4)]),
    Sample([Text(2), Image(4, 6)]),
    Sample([Image(4, 4)]),
)
# behind text and an image, before text alone, before two images, and in a row with nothing else
ROWS = ((0, 3), (4, 1), (5, 2), (6,))
LIVE = (0, 3, 5)
"""Documents in the order of rows that are no dummies."""


@cache_by_prompts
def with_dummies(family: str) -> Packed:
    """Every row has one sample, and dummies under the mask beside it or alone."""
    packed = pack(family, model_of(family), WITH_DUMMIES, ROWS)
    documents = packed.documents
    mask = torch.stack([documents == number for number in LIVE]).any(0).long()
    inputs = {name: value for name, value in packed.inputs.items() if name != "use_cache"}
    return Packed(inputs | {"attention_mask": mask}, packed.spans, packed.alone)


@pytest.mark.parametrize(("family", "method"), cases(5))
def test_masked_images_are_not_there(family: str, method: str) -> None:
    model, packed = model_of(family), with_dummies(family)
    options = settings(family, method)
    with compressed(model, method, **options) as report:
        together = logits_of(model, packed.inputs)
        kept = kept_of(model, packed)
        dummies = [
            image
            for row, start, stop in (s for n, s in enumerate(packed.spans) if n not in LIVE)
            for image in report.samples[row].images
            if start <= image.positions[0] < stop
        ]
        for layer in range(report.num_layers):
            assert not report.alive(layer)[packed.inputs["attention_mask"] == 0].any()
            assert report.visual_per_layer[layer][3] == 0
    assert {(image.num_kept, image.kept) for image in dummies} == {(0, ())}
    assert len(dummies) == 4 or (family in NEWER and len(dummies) > 4)  # one is cut in parts
    for number in LIVE:
        row, start, stop = packed.spans[number]
        with compressed(model, method, **options):
            expected = logits_of(model, real_positions(family, packed.alone[number]))[0]
            assert kept[number] == kept_of(model)[0]
        assert (together[row, start:stop] - expected).abs().max() < exact(family)


@pytest.mark.parametrize("side", ["before", "behind"])
@pytest.mark.parametrize(("family", "method"), cases("dummies"))
def test_text_with_a_dummy_alone_is_untouched(family: str, method: str, side: str) -> None:
    """Nothing is dropped from anything, and all logits are the plain model's, bit for bit."""
    model = model_of(family)
    rows = ((1, 3), (0, 2)) if side == "behind" else ((3, 1), (2, 0))
    texts = (Sample([Text(9)]), Sample([Text(6)]), Sample([Text(4)]), Sample([Image(4, 4)]))
    packed = pack(family, model, texts, rows)
    order = [n for row in rows for n in row]
    real = torch.stack([packed.documents == order.index(n) for n in (0, 1)]).any(0)
    inputs = packed.inputs | {"attention_mask": real.long()}
    expected = logits_of(model, inputs)[real]
    with compressed(model, method, **settings(family, method)) as report:
        assert torch.equal(logits_of(model, inputs)[real], expected)
        assert report.mean_keep_ratio == 0.0
        assert torch.equal(report.alive(report.num_layers - 1), real)


@final
@dataclass(frozen=True, kw_only=True)
class Shown(Compressor):
    """Keeps the tokens that a mask would leave, as a placement before any other."""

    name: ClassVar[str] = "shown"
    exact: ClassVar[bool] = False
    default_positions: ClassVar[Positions] = "original"

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=Budget(keep_ratio=0.9), adaptive=True),)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        places = torch.arange(tokens.num_visual)
        return TokenPlan(keep=places[shown(places)].expand(tokens.batch, -1).contiguous())


def shown(places: Tensor) -> Tensor:
    """Which tokens of an image a mask leaves: not the first, not one in three."""
    return (places > 0) & (places % 3 != 1)


@pytest.mark.parametrize(
    ("family", "method", "padding"), cases("partly", turning=("left", "right"))
)
def test_a_partly_masked_image_has_lost_those_tokens_before_anything_acts(
    family: str, method: str, padding: str
) -> None:
    model, inputs = model_of(family), inputs_of(family, padding)
    compressor = make(family, method)
    if compressor.changes_encoder():
        return
    whole = dict(inputs) | {"position_ids": positions(family, model, inputs)}
    with compressed(model, [Shown(), compressor]) as report:
        try:
            expected = logits_of(model, whole)
        except UnsupportedMethodError as refused:  # it needs a whole grid
            refusal: str | None = str(refused)
        else:
            refusal = None
            kept = [i.kept for s in report.samples for i in s.images]
            alive = [report.alive(layer) for layer in range(report.num_layers)]
    mask = inputs["attention_mask"].clone()
    for row, images in zip(mask, visual_positions(family, model, inputs), strict=True):
        for places in images:
            row[places[~shown(torch.arange(len(places)))]] = 0
    with compressed(model, compressor) as report:
        if refusal is not None:
            with pytest.raises(UnsupportedMethodError, match=re.escape(refusal.split(",")[0])):
                model(**whole | {"attention_mask": mask})
            return
        got = logits_of(model, whole | {"attention_mask": mask})
        assert [i.kept for s in report.samples for i in s.images] == kept
        assert all(torch.equal(report.alive(n), each) for n, each in enumerate(alive))
    assert (got - expected)[mask.bool()].abs().max() < exact(family)


def positions(family: str, model: Any, inputs: dict[str, Any]) -> Tensor:
    """Position ids of the batch before any placeholder is masked."""
    if family not in QWEN:
        return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
    return model.model.get_rope_index(**{name: inputs[name] for name in names})[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("family", "method"), cases("padding"))
def test_a_row_of_nothing_but_padding_is_no_one_elses_concern(
    family: str, method: str, padding: str
) -> None:
    """A last batch is filled up with such rows."""
    model, inputs = model_of(family), inputs_of(family, padding)
    inputs = dict(inputs) | {"position_ids": positions(family, model, inputs)}
    filled = dict(inputs)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "position_ids"):
        if name in inputs:
            axis = inputs[name].ndim - 2
            empty = torch.zeros_like(inputs[name].narrow(axis, 0, 1))
            filled[name] = torch.cat([inputs[name], empty], dim=axis)
    options = settings(family, method)
    real = inputs["attention_mask"].bool()
    with compressed(model, method, **options) as report:
        expected, samples = logits_of(model, inputs)[real], report.samples
        got = logits_of(model, filled)
        assert (got[:-1][real] - expected).abs().max() < exact(family)
        assert got.isfinite().all()
        assert report.samples[:-1] == samples
        assert report.samples[-1].images == ()
        assert not any(report.alive(layer)[-1].any() for layer in range(report.num_layers))


@pytest.mark.parametrize(
    ("family", "method"),
    cases("dummies decode", [case for case in CASES if case[0] not in QWEN]),
)
def test_generation_behind_a_masked_image_is_generation_without_it(
    family: str, method: str
) -> None:
    """(Qwen's own rope index gives a masked image's grid to the next image.)"""
    model = model_of(family)
    dummy, sample = Sample([Image(4, 4)]), Sample([Text(5), Image(4, 4), Text(7)])
    packed = pack(family, model, (sample, dummy), rows=((1, 0),))
    alone = dict(packed.alone[1])
    inputs = {n: v for n, v in packed.inputs.items() if n not in ("position_ids", "use_cache")}
    inputs["attention_mask"] = (packed.documents == 1).long()
    with compressed(model, method, **settings(family, method)):
        tokens, steps = greedy(model, inputs)
        expected_tokens, expected = greedy(model, alone)
    assert torch.equal(tokens[:, -3:], expected_tokens[:, -3:])
    assert (steps - expected).abs().max() < exact(family)
