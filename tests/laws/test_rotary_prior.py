"""The rotary prior is what the model's own rotation makes of ones, whatever was dropped before."""

import sys
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from tests.laws.cases import FAMILIES, QWEN, inputs_of, logits_of, model_of
from torch import Tensor

from vispress import compressed
from vispress.budget import Budget
from vispress.methods.base import ScorePruner
from vispress.report import CompressionReport
from vispress.types import Placement, Queries, Signal, Stage, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Reader(ScorePruner):
    """Keeps tokens without order, at layers 1 and 3, and notes what it reads."""

    name: ClassVar[str] = "reader"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.ROTARY_PRIOR})

    queries: Queries
    ahead: bool
    seen: list[tuple[VisualTokens, Tensor]]

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        first = Placement(
            stage=Stage.IN_LLM,
            budget=Budget(keep_ratio=0.6),
            layer=1,
            queries=self.queries,
            attention_of="next" if self.ahead else "previous",
        )
        return first, replace(first, layer=3, budget=Budget(keep_ratio=0.3))

    def score(self, tokens: VisualTokens) -> Tensor:
        assert tokens.rotary_prior is not None
        self.seen.append((tokens, tokens.rotary_prior))
        return torch.sin(17.0 * tokens.index)


def ones_scored(model: Any, inputs: dict[str, Any], ids: Tensor | None) -> Tensor:
    """`[B, L, L]`: ones as q and k, rotated by the model's own function, scaled."""
    tables: list[tuple[Tensor, Tensor]] = []
    layer = model.model.language_model.layers[0]

    def note(module: Any, args: Any, kwargs: Any) -> None:
        tables.append(kwargs["position_embeddings"])

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    logits_of(model, inputs if ids is None else {**inputs, "position_ids": ids})
    handle.remove()
    cos, sin = tables[0]
    rotate = sys.modules[type(layer.self_attn).__module__].apply_rotary_pos_emb
    ones = torch.ones(len(inputs["input_ids"]), 1, *cos.shape[-2:], dtype=cos.dtype)
    q, k = rotate(ones, ones, cos, sin)
    scored: Tensor = (q @ k.mT)[:, 0] * layer.self_attn.scaling
    return scored


def expected_of(
    whole: Tensor, report: CompressionReport, seen: VisualTokens, asked: Queries, valid: Tensor
) -> list[Tensor]:
    """The prior of each image that looks like the bucket's, from the whole square."""
    found = []
    for b, sample in enumerate(report.samples):
        visual = torch.zeros_like(valid[b])
        for image in sample.images:
            visual[list(image.positions)] = True
        for image in sample.images:
            if (image.num_visual, image.grid) != (seen.num_original, seen.grid):
                continue
            behind = valid[b] & ~visual
            behind[: max(image.positions) + 1] = False
            last = valid[b].nonzero()[-1]
            rows = behind.nonzero()[:, 0] if asked is Queries.TEXT_AFTER else last
            found.append(whole[b][rows][:, torch.tensor(image.positions)])
    return found


@pytest.mark.some(cases=5)
@pytest.mark.parametrize("ahead", [False, True], ids=["as_it_ran", "ahead"])
@pytest.mark.parametrize("asked", [Queries.LAST, Queries.TEXT_AFTER])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_prior_is_the_models_own_rotation_of_ones(
    family: str, asked: Queries, ahead: bool
) -> None:
    model, inputs = model_of(family), inputs_of(family)
    valid = inputs["attention_mask"].bool()
    for positions in ("original",) if family in QWEN else ("original", "compact"):
        method = Reader(queries=asked, ahead=ahead, seen=[])
        with compressed(model, method, positions=positions) as found:
            logits_of(model, inputs)
            report = found.report
        compared = 0
        for tokens, prior in method.seen:
            first = tokens.num_visual == tokens.num_original
            ids = None
            if positions == "compact" and (not first):
                # layer 2 ran, or layer 3 is to run, without what layer 1 dropped
                gone = ~report.alive(1) & valid
                ids = torch.arange(valid.shape[1]) - gone.long().cumsum(1)
            whole = ones_scored(model, inputs, ids)
            expected = expected_of(whole, report, tokens, asked, valid)
            assert prior.dtype == torch.float64
            for row, index in zip(prior, tokens.index, strict=True):
                near = [
                    e[:, index]
                    for e in expected
                    if e.shape[0] == len(row)
                    and torch.allclose(e[:, index], row, rtol=0, atol=1e-5)
                ]
                assert near, (family, positions, first)
                compared += 1
        assert compared >= 6
