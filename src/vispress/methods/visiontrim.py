"""VisionTrim: dominant tokens by encoder attention, and some more that gather what fits the text.

Yu et al., "VisionTrim: Unified Vision Token Compression for Training-Free MLLM Acceleration", ICLR
2026, arXiv:2601.22674.
Source: https://github.com/hanxunyu/VisionTrim at 22b686d (Apache-2.0).
Follows the code: a token's score is the mean of [CLS]'s attention to it and of what the other
patches give it in the layer of the features, each over its norm; of the tokens that are not
dominant those with the highest mean similarity to the text are targets; three times, each other
token goes to the target that resembles it most in its similarities to the words, and the mean of
what a target got is added to it, before the projector.
Differs: the code's local affinity, which it computes and does not use, is not offered, nor is its
stage in the LLM, which is commented out. Targets stay at their places (the code appends them).
Crops that were unpadded have shares in proportion, newlines are kept within the budget.
Reconstructed: similarity to the text is the cosine of projected tokens to the question's input
embeddings; the code has CLIP's text tower, which checkpoints in transformers lack.
`scores="column_mean"` for encoders without [CLS] is ours, too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vispress.checks import check_choice, check_integer
from vispress.methods._parts.geometry.segments import GEOMETRY, Part, split
from vispress.methods._parts.scoring.cosines import unit
from vispress.methods._parts.scoring.encoder_attention import (
    Scores,
    attention_signals,
    encoder_attention,
)
from vispress.methods._parts.scoring.question import question
from vispress.methods.base import Compressor, Evidence, descending, top_indices, upcast
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, TokenPlan, VisualTokens
from vispress_kernels import Backend
from vispress_kernels.merge_tokens import merge_tokens

PUBLISHED_SHARE = 16 / 64
"""Targets among all kept, in the published 48 + 16."""
ROUNDS = 3

Words = Callable[[Float[Tensor, "b m Dv"]], Float[Tensor, "b m L"]]
"""Similarity of encoder features to each word."""


def dominance(cls: Float[Tensor, "b n"], others: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Average [CLS]'s attention and that of the other patches, each over its norm."""
    return 0.5 * F.normalize(cls, dim=1) + 0.5 * F.normalize(others, dim=1)


def chosen(
    x: Float[Tensor, "b n Dv"],
    metric: Float[Tensor, "b n"],
    words: Words,
    counts: tuple[int, int],
    backend: Backend = "auto",
) -> tuple[Int[Tensor, "b D"], Int[Tensor, "b C"], Float[Tensor, "b C Dv"]]:
    """Choose dominant tokens and targets, ascending; what the targets become (differentiable).

    Args:
        x: Encoder features.
        metric: Whose highest are dominant.
        words: Similarity to the text.
        counts: Dominant tokens, and targets.
        backend: Kernels to use.
    """
    dominant, targets = counts
    with torch.no_grad():
        order = descending(metric)
        first, rest = (
            part.sort(dim=1).values
            for part in order.split_with_sizes([dominant, x.shape[1] - dominant], dim=1)
        )
        similar = words(x.take_along_dim(rest[..., None], dim=1))
        at = top_indices(similar.sum(dim=2), targets)
        taken = torch.zeros_like(rest, dtype=torch.int8).scatter_(1, at, 1)
        others = taken.argsort(dim=1, stable=True)[:, : rest.shape[1] - targets]
        theirs = similar.take_along_dim(others[..., None], dim=1)
    target, other = rest.gather(1, at), rest.gather(1, others)
    y, moved = (x.take_along_dim(own[..., None], dim=1) for own in (target, other))
    if targets:
        for _ in range(ROUNDS):
            with torch.no_grad():
                into = (theirs @ words(y.detach()).mT).argmax(dim=2)  # of equals the first
            y = y + merge_tokens(moved, into, targets, reduce="mean", backend=backend)
    return first, target, y


@final
@register_method("visiontrim")
@dataclass(frozen=True, kw_only=True)
class VisionTrim(Compressor):
    """Prune and merge before the projector, guided by the question.

    Args:
        complement: Targets among the kept of each sub-image (all, if that keeps no more); None for
            the published 16 of 64.
        scores: `"cls"`, or `"column_mean"` (mean attention received) for encoders without [CLS].
    """

    summary: ClassVar[str] = "most attended in the encoder; the rest gathered by the question"
    paper: ClassVar[str] = "Yu et al., ICLR 2026, arXiv:2601.22674"
    evidence: ClassVar[Evidence] = "reconstructed"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {
        Signal.CLS_ATTENTION,
        Signal.PATCH_ATTENTION,
        Signal.VISION_FEATURES,
        Signal.PROJECTOR,
        Signal.TEXT_EMBEDDINGS,
    }
    merges: ClassVar[bool] = True

    complement: int | None = None
    scores: Scores = "cls"

    def validate(self) -> None:
        check_choice("scores", self.scores, get_args(Scores))
        if self.complement is not None:
            check_integer("complement", self.complement, low=0)

    def signals(self) -> frozenset[Signal]:
        return attention_signals(self.reads, self.scores)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def split_budget(self, num_keep: int) -> tuple[int, int]:
        """Split a sub-image's budget into dominant tokens and targets."""
        asked = round(num_keep * PUBLISHED_SHARE) if self.complement is None else self.complement
        return num_keep - min(asked, num_keep), min(asked, num_keep)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        kept, values = [], []
        for parts in split(tokens, num_keep):
            found = [self.of_part(tokens, part) for part in parts]
            keep, order = torch.cat([own for own, _ in found], dim=1).sort(dim=1)
            kept.append(keep)
            own = torch.cat([value for _, value in found], dim=1)
            values.append(own.take_along_dim(order[..., None], dim=1))
        return TokenPlan(keep=torch.cat(kept), features=torch.cat(values))

    def of_part(self, tokens: VisualTokens, part: Part) -> tuple[Tensor, Tensor]:
        """Give what rows keep of a part, `[rows, K]`, and its values."""
        features = part.of(tokens.features)
        rows = len(tokens.index[part.rows])
        if part.newline:
            return part.places.expand(rows, -1), features
        project, seen = tokens.projector, tokens.vision_features
        others = tokens.patch_attention
        assert project is not None  # declared in `reads`, as the others
        assert seen is not None
        assert others is not None
        with torch.no_grad():
            text = unit(question(tokens))[part.rows]
            text = text.repeat_interleave(len(features) // rows, dim=0)
            cls = part.of(encoder_attention(tokens, self.scores))
            metric = dominance(cls, part.of(upcast(others).mean(dim=1)))
        words = partial(_to_words, project, text)
        counts = self.split_budget(part.share)
        first, target, y = chosen(part.of(seen), metric, words, counts, tokens.backend)
        value = features.take_along_dim(first[..., None], dim=1)
        if target.shape[1]:
            value = torch.cat([value, project(y).to(value.dtype)], dim=1)
        picked = torch.cat([first, target], dim=1)
        return part.chosen(picked), value.reshape(rows, -1, value.shape[-1])


def _to_words(
    project: Callable[[Tensor], Tensor], text: Float[Tensor, "b L D"], x: Float[Tensor, "b m Dv"]
) -> Float[Tensor, "b m L"]:
    """Cosines of projected tokens to each word, in at least fp32."""
    return unit(project(upcast(x))) @ text.mT
