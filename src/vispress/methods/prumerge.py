"""PruMerge: keep outliers of [CLS] attention, and add to each what its nearest tokens hold.

Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV
2025, arXiv:2403.15388.
Source: https://github.com/42Shawn/LLaVA-PruMerge at 097c041 (Apache-2.0).
Follows the code: attention and keys of the encoder's last layer, all heads as one; without a budget
the count is that of outliers above Q3 + 1.5 IQR; `plus` adds tokens at equal steps. A kept token is
itself plus the attention-weighted sum (not mean) over the 32 tokens nearest by keys; one more token
sums up the rest.
Differs: a budget (ours) has top tokens alone, or half of them and half at equal steps; raster
order, the extra token at the last free place; no outliers, small images and B > 1 work; newlines
stay. The training branch with fixed shares is not offered.
`scores="column_mean"` is a reconstruction.
Each kept token is compared with all others: time grows with K N.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.checks import check_choice, check_flag, check_integer
from vispress.methods._parts.clustering.owners import ragged
from vispress.methods._parts.geometry.segments import GEOMETRY, Part, split
from vispress.methods._parts.scoring.cosines import MOST_PAIRS, unit
from vispress.methods._parts.scoring.encoder_attention import Scores, attention_signals
from vispress.methods.base import Compressor, Evidence, descending, upcast
from vispress.registry import register_method
from vispress.types import Placement, Signal, TokenPlan, VisualTokens


def outliers(a: Float[Tensor, "n"]) -> int:
    """Count scores above the third quartile by 1.5 interquartile ranges (waits for them)."""
    low, high = a.double().quantile(torch.tensor([0.25, 0.75], device=a.device).double())
    return int((a > high + 1.5 * (high - low)).sum())


def equal_steps(n: int, ratio: float, device: torch.device | str) -> Int[Tensor, "s"]:
    """Step by a third of the mean distance of `ratio * n` tokens, the last token left out."""
    return torch.arange(0, n - 1, max(1, int(int(1 / ratio) / 3)), device=device)


def add_neighbours(
    order: Int[Tensor, "b k"], a: Tensor, keys: Tensor, x: Float[Tensor, "b n d"], neighbours: int
) -> tuple[Float[Tensor, "b k d"], Float[Tensor, "b d"]]:
    """Add what is near to the kept tokens, in their order, and sum up all others."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    keys, weighted = unit(keys), a.to(x)[..., None] * x
    parts = []
    for own in torch.split(order, max(1, MOST_PAIRS // x.shape[1]), dim=1):
        similar = (keys[rows, own] @ keys.mT).scatter(2, own[..., None], float("-inf"))
        near = similar.topk(min(neighbours, x.shape[1] - 1), dim=2).indices
        parts.append(weighted[rows[..., None], near].sum(dim=2))
    left = torch.ones_like(a, dtype=torch.bool).scatter(1, order, False)
    kept = x[rows, order] + (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
    return kept, (weighted * left[..., None]).sum(dim=1)


@torch.no_grad()
def choose(a: Float[Tensor, "b n"], limit: int, plus: bool, adaptive: bool) -> Int[Tensor, "b k"]:
    """Choose tokens to keep, the top ones first, at most `limit`.

    Args:
        a: Attention of one row alone where adaptive.
        limit: The most; met exactly unless adaptive.
        plus: Also tokens at equal steps.
        adaptive: Outliers decide the count.
    """
    n, ranked = a.shape[1], descending(a)
    if adaptive:
        ratio = outliers(a[0]) / n
        top = ranked[:, : int(n * ratio)]
        if plus:
            steps = equal_steps(n, max(ratio, 1 / n), a.device)
            top = torch.cat([top, steps[~torch.isin(steps, top)][None]], dim=1)
        return top[:, :limit]
    count = limit // 2 if plus else limit
    rest, wanted = ranked[:, count:].sort(dim=1).values, limit - count
    middle = (2 * torch.arange(wanted, device=a.device) + 1) * (n - count) // (2 * wanted or 1)
    return torch.cat([ranked[:, :count], rest[:, middle]], dim=1)


@final
@register_method("prumerge")
@dataclass(frozen=True, kw_only=True)
class PruMerge(Compressor):
    """Prune and merge before the projector; without a budget the image decides the count.

    Args:
        plus: PruMerge+: tokens at equal steps beside the outliers.
        neighbours: Tokens added to each kept one, at least 1.
        scores: `"cls"`, or `"column_mean"` (mean attention received) for encoders without [CLS].
    """

    summary: ClassVar[str] = "outliers of [CLS] attention, with what is near them"
    paper: ClassVar[str] = "Shang et al., ICCV 2025, arXiv:2403.15388"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {
        Signal.CLS_WIDE_ATTENTION,
        Signal.VISION_KEYS,
        Signal.VISION_FEATURES,
        Signal.PROJECTOR,
    }
    merges: ClassVar[bool] = True

    plus: bool = False
    neighbours: int = 32
    scores: Scores = "cls"

    def validate(self) -> None:
        check_choice("scores", self.scores, get_args(Scores))
        check_flag("plus", self.plus)
        check_integer("neighbours", self.neighbours, low=1)

    def signals(self) -> frozenset[Signal]:
        return attention_signals(self.reads, self.scores)

    def encoder_layers(self, num_layers: int, feature_layer: int) -> tuple[int, ...]:
        return (num_layers - 1,)

    @property
    def adaptive(self) -> bool:
        """Whether the image decides the count: no budget is set."""
        return self.unbudgeted

    def uncapturable(self) -> str | None:
        return "the image decides how many tokens stay; give a budget" if self.adaptive else None

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return self.before_llm(num_layers)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.vision_features is not None  # declared in `reads`, as the others
        assert tokens.vision_keys is not None
        assert tokens.projector is not None
        wide = tokens.cls_wide_attention if self.scores == "cls" else tokens.column_attention
        assert wide is not None
        a = upcast(wide).mean(dim=1)
        keys = upcast(tokens.vision_keys).transpose(1, 2).flatten(2)
        x = upcast(tokens.vision_features)

        kept = torch.zeros_like(a, dtype=torch.bool)
        newline = torch.zeros_like(kept)
        counts = [0] * tokens.batch
        index = torch.arange(tokens.batch, device=a.device)[:, None]
        for part in self._parts(tokens, num_keep):
            rows = part.of(index.expand(-1, tokens.num_visual))[:, :1]
            if part.newline:
                places = part.places.expand(len(rows), -1)
                newline = newline.index_put((rows, places), newline.new_ones(()))
            else:
                places, values = self._merged(part, a, keys, x)
                x = x.index_put((rows, places), values)
            kept = kept.index_put((rows, places), kept.new_ones(()))
            of_row = range(tokens.batch)[part.rows]
            for row in of_row:
                counts[row] += places.numel() // len(of_row)

        keep = (~kept).to(torch.int8).argsort(dim=1, stable=True)[:, : max(counts)]
        features = tokens.projector(x[index, keep]).to(tokens.features)
        as_it_was = newline[index, keep][..., None]
        features = torch.where(as_it_was, tokens.features[index, keep], features)
        return TokenPlan(keep=ragged(keep, counts), features=features)

    def _parts(self, tokens: VisualTokens, num_keep: int) -> Iterator[Part]:
        """List sub-images of all rows together, or one by one where each decides its count."""
        groups = split(tokens, num_keep, together=not self.adaptive)
        for part in (part for parts in groups for part in parts):
            if not self.adaptive:
                yield part
                continue
            for row in range(tokens.batch)[part.rows]:
                yield Part(slice(row, row + 1), part.places, part.share, part.newline)

    def _merged(
        self, part: Part, a: Tensor, keys: Tensor, x: Tensor
    ) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k d"]]:
        """Choose tokens of a part, with new values; the last one holds all that is not chosen."""
        own = part.of(a), part.of(keys), part.of(x)
        order = choose(own[0], part.share - 1, self.plus, self.adaptive)
        values, rest = add_neighbours(order, *own, self.neighbours)
        places = part.of(torch.arange(a.shape[1], device=a.device).expand_as(a))
        # it stands at the last place that is free
        free = torch.ones_like(places).scatter(1, order, 0).cumsum(1).argmax(1)[:, None]
        places = places.gather(1, torch.cat([order, free], dim=1))
        return places, torch.cat([values, rest[:, None]], dim=1)
