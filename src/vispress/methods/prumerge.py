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
"""

from dataclasses import dataclass
from typing import ClassVar, final, get_args

import torch

from vispress.checks import check_choice, check_flag, check_integer
from vispress.methods._parts.geometry.segments import GEOMETRY, Part, split
from vispress.methods._parts.scoring.encoder_attention import Scores, attention_signals
from vispress.methods._parts.scoring.outliers import add_neighbours, choose
from vispress.methods.base import Compressor, Evidence, upcast
from vispress.registry import register_method
from vispress.types import Placement, Signal, TokenPlan, VisualTokens


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

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return self.before_llm(num_layers)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.vision_features is not None  # declared in `reads`, as the others
        assert tokens.vision_keys is not None
        assert tokens.projector is not None
        wide = tokens.cls_wide_attention if self.scores == "cls" else tokens.column_attention
        assert wide is not None
        a, keys = upcast(wide).mean(dim=1), upcast(tokens.vision_keys).transpose(1, 2).flatten(2)
        x = upcast(tokens.vision_features)
        kept, same = (torch.zeros_like(a, dtype=torch.bool) for _ in range(2))
        index, counts = torch.arange(len(a), device=a.device), [0] * len(a)
        for part in (part for parts in split(tokens, num_keep) for part in parts):
            numbers = range(len(a))[part.rows]
            alone = [Part(slice(i, i + 1), part.places, part.share, part.newline) for i in numbers]
            for each in alone if self.adaptive else [part]:
                places = each.places.expand(len(index[each.rows]), -1)
                if each.newline:
                    same = same.index_put((index[each.rows, None], places), same.new_ones(()))
                else:
                    order = choose(each.of(a), each.share - 1, self.plus, self.adaptive)
                    own = each.of(a), each.of(keys), each.of(x)
                    values, rest = add_neighbours(order, *own, self.neighbours)
                    free = torch.ones_like(places).scatter(1, order, 0).cumsum(1).argmax(1)[:, None]
                    places = places.gather(1, torch.cat([order, free], dim=1))
                    values = torch.cat([values, rest[:, None]], dim=1)
                    x = x.index_put((index[each.rows, None], places), values)
                kept = kept.index_put((index[each.rows, None], places), kept.new_ones(()))
                for i in range(len(a))[each.rows]:
                    counts[i] += places.shape[1]
        keep = (~kept).to(torch.int8).argsort(dim=1, stable=True)[:, : max(counts)]
        rows = index[:, None]
        features = tokens.projector(x[rows, keep]).to(tokens.features)
        features = torch.where(same[rows, keep][..., None], tokens.features[rows, keep], features)
        if len(set(counts)) == 1:
            return TokenPlan(keep=keep, features=features)
        return TokenPlan(
            keep=tuple(own[:count] for own, count in zip(keep, counts, strict=True)),
            features=features,
        )
