"""Law 6: every image keeps exactly what was asked, after every placement; anything else
is an error.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tests.laws.cases import (
    BUDGETED,
    DROPPING,
    FAMILIES,
    cases,
    inputs_of,
    logits_of,
    make,
    model_of,
    settings,
)
from torch import Tensor

from vispress import compressed, registry
from vispress.config import make_compressor
from vispress.errors import BudgetError, VispressError
from vispress.methods import DivPrune, FastV, PyramidDrop
from vispress.methods.base import Compressor, ScorePruner
from vispress.report import CompressionReport, ImageReport
from vispress.types import Placement, Stage, TokenPlan, VisualTokens

RULES: dict[str, Callable[[float], int]] = {
    "floor": math.floor,
    "ceil": math.ceil,
    "round": lambda x: math.floor(x + 0.5) if x % 1 != 0.5 else 2 * round(x / 2),
}
LAYERS = 6
LAST = (True, False, True)
"""Which images of the common batch are the last ones of their prompts."""


def asked(method: Compressor, entered: int, *, last: bool = True) -> list[int]:
    """Counts after each placement, worked out from its ratio or number alone.

    Args:
        method: Whose placements.
        entered: Tokens of the image.
        last: Whether it is the last one of its prompt; some placements leave it, or the others.
    """
    counts: list[int] = []
    left = entered
    for placement in method.placements(LAYERS):
        if placement.stage is Stage.ENCODER:  # hides nothing from the LLM
            continue
        budget = placement.budget
        count = budget.num_tokens
        if placement.images == ("earlier" if last else "last"):
            count = entered
        elif count is None:
            assert budget.keep_ratio is not None
            count = max(1, RULES[budget.rounding](budget.keep_ratio * entered))
        counts.append(min(count, left))
        left = left if placement.until else counts[-1]  # those that bypass layers come back
    return counts


def assert_met(image: ImageReport, method: Compressor, *, last: bool = True) -> None:
    got = [placement.num_kept for placement in image.placements]
    expected = asked(method, image.num_visual, last=last)
    if method.exact or method.name == "uniform":  # along the raster, uniform steps are exact
        assert got == expected
    else:
        assert all(0 < g <= e for g, e in zip(got, expected, strict=True))
    for placement in image.placements:
        assert placement.num_kept == len(placement.kept) == len(set(placement.kept))
        assert list(placement.kept) == sorted(placement.kept)
        assert set(placement.kept) <= set(range(image.num_visual))
    assert image.num_kept == (image.num_visual if comes_back(image) else got[-1])


def comes_back(image: ImageReport) -> bool:
    """Whether what bypasses layers is there again in the last one."""
    return image.placements[-1].until not in (None, LAYERS)


def images(model: Any, inputs: dict[str, Any], *methods: Any) -> list[ImageReport]:
    """Reports of all images; what they say is compared with the rows that were really there."""
    with compressed(model, list(methods)) as view:
        logits_of(model, inputs)
        report = view.report
    for layer, counts in enumerate(report.visual_per_layer):
        for b, sample in enumerate(report.samples):
            found = [assert_rows_agree(report, b, image, layer) for image in sample.images]
            assert counts[b] == sum(found)
    return [image for sample in report.samples for image in sample.images]


def assert_rows_agree(report: CompressionReport, b: int, image: ImageReport, layer: int) -> int:
    """What an image's placements say against the rows alive in a layer; returns their number."""
    alive = report.alive(layer)[b, list(image.positions)].nonzero().flatten().tolist()
    kept: Sequence[int] = range(image.num_visual)
    for placement in image.placements:  # the last one that has acted counts
        if placement.layer <= layer < (placement.until or LAYERS):
            kept = placement.kept
    assert alive == list(kept)
    return len(alive)


@pytest.mark.parametrize(("family", "method"), cases(6, DROPPING))
def test_each_image_keeps_its_share(family: str, method: str) -> None:
    compressor = make(family, method)
    found = images(model_of(family), inputs_of(family), compressor)
    for image, last in zip(found, LAST, strict=True):
        assert_met(image, compressor, last=last)


@pytest.mark.parametrize(("family", "method"), cases("numbers", sorted({*BUDGETED} & {*DROPPING})))
def test_each_image_keeps_the_number_asked(family: str, method: str) -> None:
    """For methods that take no number the test above holds: they keep 0."""
    chosen = {k: v for k, v in settings(family, method).items() if k != "keep_ratio"}
    for count in (1, 7):
        compressor = make_compressor(method, **chosen, num_tokens=count)
        found = images(model_of(family), inputs_of(family), compressor)
        for image, last in zip(found, LAST, strict=True):
            assert_met(image, compressor, last=last)
            if compressor.exact or method == "uniform":
                assert image.placements[-1].num_kept == count


@pytest.mark.parametrize("ratio", [1e-9, 0.02, 0.125, 0.5, 0.61, 0.999])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_ratio_is_met_and_never_gives_zero(family: str, ratio: float) -> None:
    for method in (DivPrune(keep_ratio=ratio), FastV(keep_ratio=ratio, layer=3)):
        for image in images(model_of(family), inputs_of(family), method):
            assert_met(image, method)
            assert image.num_kept >= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_of_a_chain_takes_its_share_of_what_is_left(family: str) -> None:
    first, second = DivPrune(keep_ratio=0.5), FastV(keep_ratio=0.5, layer=2)
    for image in images(model_of(family), inputs_of(family), first, second):
        left = asked(first, image.num_visual)[0]
        assert [p.num_kept for p in image.placements] == [left, asked(second, left)[0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_schedule_refers_to_the_tokens_that_reached_its_first_stage(family: str) -> None:
    first = DivPrune(keep_ratio=0.8)
    schedule = PyramidDrop(layers=(1, 3, 5), ratios=(0.5, 0.25, 0.1))
    for image in images(model_of(family), inputs_of(family), first, schedule):
        left = asked(first, image.num_visual)[0]
        stages = [max(1, math.floor(r * left)) for r in (0.5, 0.25, 0.1)]
        assert [p.num_kept for p in image.placements] == [left, *stages]


@pytest.mark.parametrize("mean", [0.4, 0.6, 0.9])
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "transprune"])
def test_a_mean_over_layers_is_met_to_a_token_a_layer(method: str, mean: float) -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    with compressed(model, method, mean_keep_ratio=mean) as report:
        logits_of(model, inputs)
        assert report.mean_keep_ratio == pytest.approx(mean, abs=1 / 36)


def test_the_grid_of_a_grid_method_is_reported_when_it_is_smaller_than_asked() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    with compressed(model, "avg_pool", num_tokens=14) as report:
        logits_of(model, inputs)
        counts = {i.num_kept for s in report.samples for i in s.images}
    assert counts == {12}  # 3 x 4 of at most 14


@dataclass(frozen=True, kw_only=True)
class Miscounting(Compressor):
    """Keeps `more` tokens beyond its budget."""

    name: ClassVar[str] = "miscounting"
    summary: ClassVar[str] = "the wrong number of tokens"
    paper: ClassVar[str] = "control"

    more: int = 1

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        keep = torch.arange(num_keep + self.more, device=tokens.features.device)
        return TokenPlan(keep=keep.expand(tokens.batch, -1))


@dataclass(frozen=True, kw_only=True)
class Loose(Miscounting):
    """The same, but it says that its counts are its own."""

    name: ClassVar[str] = "loose"
    exact: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class Ragged(Loose):
    """A count of its own for every image: one, two, three ..."""

    name: ClassVar[str] = "ragged"

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        return TokenPlan(keep=tuple(torch.arange(row + 1) for row in range(tokens.batch)))


@dataclass(frozen=True, kw_only=True)
class RaggedInLLM(Ragged):
    """Between decoder layers."""

    name: ClassVar[str] = "ragged_in_llm"

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.IN_LLM, budget=self.budget(num_layers), layer=2),)


@pytest.mark.some(cases=14)
@pytest.mark.parametrize("more", [-3, -1, 1, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_another_count_than_asked_is_an_error(family: str, more: int) -> None:
    model, inputs = model_of(family), inputs_of(family)
    expected = logits_of(model, inputs)
    with compressed(model, Miscounting(num_tokens=6, more=more)):
        with pytest.raises(BudgetError, match=f"keeps {6 + more} tokens .* budget is 6"):
            logits_of(model, inputs)
        with pytest.raises(BudgetError):
            model.generate(**inputs, max_new_tokens=2)
    assert torch.equal(logits_of(model, inputs), expected)


def test_more_tokens_than_there_are_is_an_error_even_of_methods_with_counts_of_their_own() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    with compressed(model, Loose(num_tokens=6, more=100)), pytest.raises(BudgetError, match="106"):
        logits_of(model, inputs)


@pytest.mark.parametrize("cls", [Ragged, RaggedInLLM])
@pytest.mark.parametrize("family", FAMILIES)
def test_adaptive_counts_are_reported_as_they_are(family: str, cls: type[Ragged]) -> None:
    model, inputs = model_of(family), inputs_of(family)
    found = images(model, inputs, cls(num_tokens=6))
    counts = sorted(image.num_kept for image in found)
    buckets = len({(image.num_visual, image.grid) for image in found})
    assert counts == {1: [1, 2, 3], 2: [1, 1, 2], 3: [1, 1, 1]}[buckets]
    for image in found:
        assert image.kept == tuple(range(image.num_kept))


@dataclass(frozen=True, kw_only=True)
class Scored(ScorePruner):
    """A score pruner whose scores have the wrong shape."""

    summary: ClassVar[str] = "too few scores"
    paper: ClassVar[str] = "control"

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.features.sum(-1)[:, :3]


def test_a_registered_method_with_too_few_scores_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry.list_methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register_method("scored_wrongly")(Scored)
    model, inputs = model_of("llava"), inputs_of("llava")
    with (
        compressed(model, "scored_wrongly", num_tokens=6),
        pytest.raises(VispressError, match="keeps 3 tokens"),
    ):
        logits_of(model, inputs)
