"""ToMe: merge the most similar tokens in every layer of the vision encoder.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv:2210.09461
Source: https://github.com/facebookresearch/ToMe at af95e4b (CC-BY-NC: described only).
Follows the code: keys averaged over heads; even tokens [CLS] A, odd ones B; between attention and
MLP the most similar pairs are merged into means weighted by size, log(size) is added to the
attention logits; [CLS] stays; A's remainder comes first, then B. The count follows LightCompress
for LLaVA: as many merges in each layer up to the one that gives the features, the last one
corrected (r = 16 over 23 layers leaves 208 of 576).
Differs: behind the encoder every token gets its group's value again, so that the model sees all
places, and before the LLM one token a group is kept, at its first place (raster order); sizes are
never reset (LightCompress resets them in each layer).
Reconstructed: tokens that a merger joins (Qwen-VL, InternVL) are merged as wholes; sequences are
image by image, and inside windows (Qwen2.5-VL), where keys are compared post-RoPE and a merged
token has the rotation of its odd member. Where layers are too few for the budget, or groups do not
fit visual tokens (unpadded crops, pooled frames), the rest is merged before the LLM by the same
rule on the visual tokens, crop by crop; where too few groups are left, copies fill up. Newlines
stay.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vispress.budget import Budget
from vispress.checks import check_flag, check_number
from vispress.methods._parts.clustering.bipartite import fold, match, schedule
from vispress.methods._parts.clustering.owners import mean_plan
from vispress.methods._parts.geometry.segments import GEOMETRY, Part, owner_by_segment
from vispress.methods.base import Compressor, Evidence, upcast
from vispress.methods.encoder_merger import EncoderMerger, EncoderTokens
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, TokenPlan, VisualTokens
from vispress_kernels import Backend
from vispress_kernels.merge_tokens import merge_tokens


def first_members(groups: Int[Tensor, "B n"]) -> Int[Tensor, "B n"]:
    """Find the first token of each token's group."""
    named, order = groups.sort(dim=1, stable=True)
    starts = F.pad(named[:, 1:] != named[:, :-1], (1, 0), value=True)
    # places of group starts in the sorted row, carried on to the end of each group
    index = torch.arange(groups.shape[1], device=groups.device)
    start = (index * starts).cummax(dim=1).values
    return order.scatter(1, order, order.gather(1, start))


def dense(groups: Int[Tensor, "B n"]) -> tuple[Int[Tensor, "B n"], Int[Tensor, "B"]]:
    """Number groups 0, 1, ... in the order of their first tokens, and count them in each row."""
    first = first_members(groups)
    starts = first == torch.arange(groups.shape[1], device=groups.device)
    number = starts.cumsum(1)
    return number.gather(1, first) - 1, number[:, -1]


def owners(
    x: Float[Tensor, "B n D"], groups: Int[Tensor, "B n"], num_keep: int, backend: Backend
) -> Int[Tensor, "B n"]:
    """Find each token's kept place: `num_keep` of them in every row, a group's first.

    Groups are merged until they are few enough; where they are too few, their later members stay.
    No count is read on the host.

    Args:
        x: Tokens; groups are compared by their means.
        groups: Equal numbers are one group.
        num_keep: K, at least 1 and at most n.
        backend: Kernels to use.
    """
    place, count = dense(groups)
    width = groups.shape[1]
    while width > num_keep:
        means = merge_tokens(x, place, width, reduce="mean", backend=backend)
        over = torch.minimum((count - num_keep).clamp(min=0), count // 2)
        edges = match(means, count, backend=backend)
        place = fold(*edges, count, over, width, in_order=False).gather(1, place)
        count, width = count - over, max(num_keep, (width + 1) // 2)
    index = torch.arange(place.shape[1], device=place.device)
    first = torch.full_like(place, place.shape[1])
    first = first.scatter_reduce_(1, place, index.expand_as(place), "amin").gather(1, place)
    keep = (first != index).to(torch.int8).argsort(dim=1, stable=True)[:, :num_keep]
    return first.scatter(1, keep, keep)


@final
@register_method("tome")
@dataclass(frozen=True, kw_only=True)
class ToMe(Compressor, EncoderMerger):
    """Merge in the encoder, and hand one token a group to the LLM.

    The budget is that of the LLM, exact for each image; in the encoder it is what each image's
    sequences together should have behind the last layer. Reports give both.

    Args:
        inflect: Shape of the schedule, in `[-1, 1]`: 0 merges as many in each layer, 1 ever more,
            -1 ever fewer.
        restore: The LLM gets every visual token, merged ones as copies: only the encoder has less
            to do, and the budget is that of the encoder alone.
    """

    summary: ClassVar[str] = "means of similar tokens, merged layer by layer in the encoder"
    paper: ClassVar[str] = "Bolya et al., ICLR 2023, arXiv:2210.09461"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.ENCODER_GROUPS}
    merges: ClassVar[bool] = True

    inflect: float = 0.0
    restore: bool = False

    def validate(self) -> None:
        check_number("inflect", self.inflect, low=-1.0, high=1.0)
        check_flag("restore", self.restore)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        budget = self.budget(num_layers)
        left = Budget(keep_ratio=1.0) if self.restore else budget
        return (
            Placement(stage=Stage.ENCODER, budget=budget),
            Placement(stage=Stage.PRE_LLM, budget=left),
        )

    def merges_per_layer(self, num_tokens: int, num_keep: int, num_layers: int) -> tuple[int, ...]:
        over, left, counts = max(0, num_tokens - num_keep), num_tokens, []
        wishes = schedule(num_layers, -(-over // num_layers), self.inflect)
        for wish in [*wishes[:-1], over]:  # the last layer takes what is still over
            counts.append(min(wish, left - num_keep, left // 2) if left > num_keep else 0)
            left -= counts[-1]
        return tuple(counts)

    def fold(self, tokens: EncoderTokens) -> Int[Tensor, "B n"]:
        keys, cls = tokens.keys.mean(dim=1), tokens.has_cls
        edges = match(keys, tokens.count, protect_first=cls, backend=tokens.backend)
        return fold(*edges, tokens.count, tokens.merges, keys.shape[1], in_order=cls)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.encoder_groups is not None  # declared in `reads`
        x, groups = upcast(tokens.features), tokens.encoder_groups

        def own(part: Part) -> Tensor:
            return owners(part.of(x), part.of(groups), part.share, tokens.backend)

        return mean_plan(owner_by_segment(tokens, num_keep, own), [num_keep], x.dtype)
