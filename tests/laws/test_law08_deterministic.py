"""Law 8: the same input gives the same tokens, whatever the global seed, ties and dtype."""

import random
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tests.laws.cases import (
    CASES,
    FAMILIES,
    Spy,
    cases,
    greedy,
    inputs_of,
    logits_of,
    make,
    model_of,
    settings,
)
from torch import Tensor

from vispress import compressed, compression_report
from vispress.methods import Random, ZOOPrune
from vispress.methods.base import Compressor, ScorePruner
from vispress.report import CompressionReport
from vispress.types import Placement, Queries, Signal, Stage, TokenPlan, VisualTokens

HALF = (torch.bfloat16, torch.float16)


def kept(report: CompressionReport) -> list[list[tuple[int, ...]]]:
    """Kept sets of all images, placement by placement."""
    return [[p.kept for p in i.placements] for s in report.samples for i in s.images]


@pytest.mark.parametrize(("family", "method"), cases(8))
def test_twice_is_once_whatever_the_global_seed(family: str, method: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    seen = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        with compressed(model, method, **settings(family, method)) as report:
            logits = logits_of(model, inputs)
            seen.append((logits, kept(report.report)))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.random.get_state()[1].tolist() == states[1]
        assert random.getstate() == states[2]
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1] == seen[1][1]


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_and_a_second_prefill_repeat_themselves(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    with compressed(model, "random", keep_ratio=0.4):
        first = greedy(model, inputs)
        kept_first = kept(compression_report(model))
        second = greedy(model, inputs)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        assert kept(compression_report(model)) == kept_first


@pytest.mark.parametrize("cls", [Random, ZOOPrune])
def test_seeds_are_parameters(cls: Any) -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    sets = []
    for seed in (0, 0, 1):
        with compressed(model, cls(keep_ratio=0.4, seed=seed)) as report:
            logits_of(model, inputs)
            sets.append(kept(report.report))
    assert sets[0] == sets[1]
    assert cls is ZOOPrune or sets[0] != sets[2]


@dataclass(frozen=True, kw_only=True)
class Tied(ScorePruner):
    """Finds all tokens equally good."""

    name: ClassVar[str] = "tied"
    summary: ClassVar[str] = "ties only"
    paper: ClassVar[str] = "control"

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def score(self, tokens: VisualTokens) -> Tensor:
        return torch.ones_like(tokens.features[..., 0])


@dataclass(frozen=True, kw_only=True)
class TiedByAttention(Tied):
    """Scores by attention that a model with zero queries spreads evenly."""

    name: ClassVar[str] = "tied_by_attention"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.QUERY_ATTENTION})

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        budget = self.budget(num_layers)
        return (Placement(stage=Stage.IN_LLM, budget=budget, layer=2, queries=Queries.LAST),)

    def score(self, tokens: VisualTokens) -> Tensor:
        assert tokens.query_attention is not None
        return tokens.query_attention.mean((1, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_ties_keep_the_earlier_tokens(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    with compressed(model, Tied(num_tokens=5)) as report:
        logits_of(model, inputs)
        assert kept(report.report) == [[(0, 1, 2, 3, 4)]] * 3


@pytest.mark.parametrize("method", [TiedByAttention(num_tokens=5), make("llava", "fastv", layer=2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_even_attention_keeps_the_earlier_tokens(family: str, method: Any) -> None:
    """Zero keys: softmax gives every token the same, exactly."""
    model, inputs = model_of(family), inputs_of(family)
    attention = model.model.language_model.layers[1].self_attn
    saved = {name: p.detach().clone() for name, p in attention.k_proj.named_parameters()}
    try:
        with torch.no_grad():
            for parameter in attention.k_proj.parameters():
                parameter.zero_()
        with compressed(model, method) as report:
            logits_of(model, inputs)
            for sets in kept(report.report):
                assert sets == [tuple(range(len(sets[0])))]
    finally:
        attention.k_proj.load_state_dict(saved)


def upcast(tokens: VisualTokens) -> VisualTokens:
    """The same signals in fp32."""
    wide = {
        f.name: value.float()
        for f in fields(tokens)
        if isinstance(value := getattr(tokens, f.name), Tensor) and value.is_floating_point()
    }
    return replace(tokens, **wide)


def spied(model: Any, inputs: dict[str, Any], method: Any) -> list[tuple[VisualTokens, TokenPlan]]:
    spy = Spy()
    with compressed(model, spy.watch(method)):
        assert logits_of(model, inputs).isfinite().all()
    return spy.seen


def assert_scored_in_fp32(family: str, compressor: Compressor, dtype: torch.dtype) -> None:
    model, inputs = model_of(family, dtype), inputs_of(family, dtype=dtype)
    seen = spied(model, inputs, compressor)
    # no plan is needed to keep nothing, or to leave the prefill whole
    assert seen or not compressor.takes_budget or compressor.cache_evictor() is not None
    for tokens, plan in seen:
        if tokens.query_attention is not None:
            assert tokens.query_attention.dtype == torch.float32
        for step in tokens.transition or ():
            assert {step.magnitude.dtype, step.cosine.dtype} == {torch.float32}
        if isinstance(compressor, ScorePruner):
            assert compressor.score(tokens).dtype == torch.float32
        num_keep = plan.counts[0]
        if not compressor.exact:  # a grid may be smaller than what was asked
            num_keep = compressor.placements(6)[0].budget.resolve(tokens.num_visual)
        with torch.no_grad():
            wide = compressor.plan(upcast(tokens), num_keep)
        for one, other in zip(wide.keep, plan.keep, strict=True):
            assert torch.equal(one, other)
        if plan.assign is not None:
            assert torch.equal(wide.assign, plan.assign)


@pytest.mark.parametrize(("family", "method"), cases("bf16"))
def test_bf16_decides_as_its_signals_in_fp32(family: str, method: str) -> None:
    assert_scored_in_fp32(family, make(family, method), torch.bfloat16)


@pytest.mark.parametrize(
    ("family", "method"),
    cases("fp16", [case for case in CASES if case[0] in ("llava", "qwen2_5_vl")]),
)
def test_fp16_decides_as_its_signals_in_fp32(family: str, method: str) -> None:
    assert_scored_in_fp32(family, make(family, method), torch.float16)


@pytest.mark.parametrize("dtype", HALF)
def test_half_models_generate_with_short_caches(dtype: torch.dtype) -> None:
    model, inputs = model_of("llava", dtype), inputs_of("llava", dtype=dtype)
    for method in ("fastv", "visionzip", "transprune"):
        with compressed(model, method, **settings("llava", method)):
            tokens, logits = greedy(model, inputs)
        assert logits.isfinite().all()
        assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3


@dataclass(frozen=True, kw_only=True)
class InModelDtype(Tied):
    """Scores in the precision of the model, and rounds what it would keep apart."""

    name: ClassVar[str] = "in_model_dtype"

    def score(self, tokens: VisualTokens) -> Tensor:
        return 1 + tokens.features.norm(dim=-1) / 1024  # in bf16 all are 1


@dataclass(frozen=True, kw_only=True)
class TooLate(InModelDtype):
    """Widens its scores after they were rounded."""

    name: ClassVar[str] = "too_late"

    def score(self, tokens: VisualTokens) -> Tensor:
        return super().score(tokens).float()


@pytest.mark.parametrize("cls", [InModelDtype, TooLate])
def test_scores_in_half_precision_are_noticed(cls: type[Tied]) -> None:
    with pytest.raises(AssertionError):
        assert_scored_in_fp32("llava", cls(keep_ratio=0.5), torch.bfloat16)
