"""VMTC: keep what [CLS] attends to most, and cluster the rest by likeness into weighted means.

Yang et al., "Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image
Redundancy", 2024, arXiv:2411.15453.
Source: the abstract and a description by others, read through a specification; no code was read.
Follows: primary tokens are those of highest [CLS] attention; the others go to clusters by cosine
(k-means, before the projector), each merged by a mean weighted with that attention.
Differs: its companion, which masks pairs of words and image tokens inside the LLM, is `cmai`; crops
and frames are compressed on their own, newlines stay.
Reconstructed: all numbers (144 primary tokens and 72 clusters of 576, ten rounds from seeded
k-means++), and the place of a cluster: that of its member nearest to their mean raster position.
`scores="column_mean"` is for encoders without [CLS].
Each round compares all tokens with all clusters: time grows with N^2 for a share of the tokens.
"""

from dataclasses import dataclass
from typing import ClassVar, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.checks import check_choice, check_integer, check_number
from vispress.methods._parts.clustering.kmeans import kmeans, take
from vispress.methods._parts.clustering.owners import kept_and_slots
from vispress.methods._parts.geometry.segments import GEOMETRY, split
from vispress.methods._parts.scoring.encoder_attention import (
    Scores,
    attention_signals,
    encoder_attention,
)
from vispress.methods.base import Compressor, Evidence, descending
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, TokenPlan, VisualTokens


def clustered(
    a: Float[Tensor, "b n"], x: Float[Tensor, "b n D"], primary: int, clusters: int, seed: int
) -> tuple[Int[Tensor, "b n"], Float[Tensor, "b n"]]:
    """Find the token that each one is folded into (-1: none, no clusters), and its weight there."""
    ranked = descending(a)
    first, rest = ranked[:, :primary], ranked[:, primary:].sort(dim=1).values
    owner = torch.full_like(ranked, -1).scatter(1, first, first)
    weight = torch.ones_like(a)
    if not clusters:
        return owner, weight
    label, own = kmeans(take(x, rest), clusters, seed), a.gather(1, rest)
    member = label[..., None] == torch.arange(clusters, device=a.device)
    members = member.to(a)
    sums, sizes = (own[:, None] @ members)[:, 0], members.sum(dim=1)
    attended = sums > 0
    share = torch.where(attended, sums.clamp(min=torch.finfo(a.dtype).tiny), sizes).reciprocal()
    plain = torch.where(attended.gather(1, label), own, 1.0)
    weight = weight.scatter(1, rest, plain * share.gather(1, label))
    middle = (rest.to(a)[:, None] @ members)[:, 0] / sizes
    off = (rest - middle.gather(1, label)).abs()
    nearest = off[..., None].masked_fill(~member, float("inf")).argmin(dim=1)
    return owner.scatter(1, rest, rest.gather(1, nearest).gather(1, label)), weight


@final
@register_method("vmtc")
@dataclass(frozen=True, kw_only=True)
class VMTC(Compressor):
    """Prune and merge before the projector, by [CLS] attention and clusters of the rest.

    Args:
        cluster_ratio: Share of the kept tokens that are clusters, in `[0, 1]`.
        seed: Of the clusters' starts, at least 0.
        scores: `"cls"`, or `"column_mean"` (mean attention received) for encoders without [CLS].
    """

    summary: ClassVar[str] = "most attended by [CLS], and clusters of the rest"
    paper: ClassVar[str] = "Yang et al. 2024, arXiv:2411.15453"
    evidence: ClassVar[Evidence] = "reconstructed"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {
        Signal.CLS_ATTENTION,
        Signal.VISION_FEATURES,
        Signal.PROJECTOR,
    }
    merges: ClassVar[bool] = True

    cluster_ratio: float = 1 / 3
    seed: int = 0
    scores: Scores = "cls"

    def validate(self) -> None:
        check_choice("scores", self.scores, get_args(Scores))
        check_number("cluster_ratio", self.cluster_ratio, low=0.0, high=1.0)
        check_integer("seed", self.seed, low=0)

    def signals(self) -> frozenset[Signal]:
        return attention_signals(self.reads, self.scores)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.vision_features is not None  # declared in `reads`
        attention = encoder_attention(tokens, self.scores)
        owner = torch.full_like(attention, -1, dtype=torch.int64)
        weight = torch.ones_like(attention)
        for part in (part for parts in split(tokens, num_keep) for part in parts):
            if part.newline:
                owner[part.rows, part.places] = part.places
                continue
            clusters = round(part.share * self.cluster_ratio)
            a, x = part.of(attention), part.of(tokens.vision_features)
            into, own = clustered(a, x, part.share - clusters, clusters, self.seed)
            owner[part.rows, part.places] = part.tokens(into)
            weight[part.rows, part.places] = part.shaped(own)
        keep, slots = kept_and_slots(owner, num_keep)
        return TokenPlan(keep=keep, assign=slots, weight=weight.float(), merge_on="vision_features")
