"""DyCoke: of a video, keep some frames whole, and in others what is least like the whole ones.

Tao et al., "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", CVPR 2025,
arXiv:2411.15024.
Source: the authors' code (KD-TAO/DyCoke dd74634, Apache-2.0) and its vectors.
Follows the code: temporal token merging, which prunes. In windows of four frames the second and
fourth keep the three tenths that are least like (cosine) the first and third, and the third what is
least like the first; the third of the last window stays whole. Without a budget the count is that.
A decoding step whose attention in one layer (2 of 28) is unlike the last step's chooses what the
layers behind it see of the video; all stays cached (`dynamic`).
Differs: of an odd number of frames the last stays whole (the code loses it, and fails below five
frames). A step that is like the one before keeps the choice, where the code shows everything
(`reference_quirks`). 0.7 is dropped, and hidden (the evaluation's K and the paper's P; the code's
defaults are 0.3 and 0.8), at least one token chosen, several videos ranked together. The code
counts a video's last token as text while decoding, and compares a prompt's first step with the last
one of the prompt before. A budget (ours) is met by what pruned frames keep; one that whole frames
alone exceed is shared out over these, by change since the whole frame before (the first: until the
next); one of everything turns the dynamic cache off. Raster order (the code's is its ranking's).
Newlines stay if they fit. Images pass whole.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from vispress.budget import Budget, allocate, scaled_layer
from vispress.checks import check_flag, check_integer, check_number
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods._parts.video.frames import frames
from vispress.methods.base import Compressor, Evidence, check_layer, descending, upcast
from vispress.methods.cached_selector import CachedSelector, Selection
from vispress.registry import register_method
from vispress.types import Need, Placement, Queries, Signal, Stage, TokenPlan, VisualTokens

FIRST_BEHIND = 3
"""The first decoder layer that sees a part, of 28 or of 32."""


def references(number: int) -> tuple[list[int], list[bool]]:
    """Choose the frame that each one is compared with, and the frames that stay whole.

    Args:
        number: Frames of the video.
    """
    thirds = {i + 2 for i in range(0, number - 4, 4)}
    whole = [f % 2 == 0 and f not in thirds for f in range(number)]
    reference = [min(1, number - 1)]
    for frame in range(1, number):
        if frame % 2:
            reference.append(frame - 1)
        elif frame in thirds:
            reference.append(frame - 2)
        else:
            reference.append(max(f for f in range(frame) if whole[f]))
    return reference, whole


def frame_shares(whole: list[bool], size: int, num_keep: int) -> list[int]:
    """Share a budget among frames of `size` tokens: whole frames first, the others alike."""
    main = allocate(num_keep, [size if stays else 0 for stays in whole])
    rest = allocate(num_keep - sum(main), [0 if stays else size for stays in whole])
    return [a + b for a, b in zip(main, rest, strict=True)]


@final
@register_method("dycoke")
@dataclass(frozen=True, kw_only=True)
class DyCoke(CachedSelector, Compressor):
    """Prune videos before the LLM by similarity of frames, and hide more while decoding.

    Args:
        pruned: Without a budget: fraction dropped of each frame that is pruned, in `[0, 1]`.
        dynamic: Whether deeper layers see a part of the cached video while decoding. Without a KV
            cache (`use_cache=False`) every step is a prefill, which sees all.
        decode_layer: Decoder layer (0-based) whose attention is read then; those behind it see the
            part. None for the published 2 of 28 (the code's L = 3 is the first of those behind),
            scaled by depth.
        decode_pruned: Fraction hidden from them, in `[0, 1]`.
        similarity: Cosine of a step's attention with the last one's from which the choice stays.
        reference_quirks: Steps that stay see everything, as in the code.
    """

    summary: ClassVar[str] = "of videos: some whole frames, of others what is least like them"
    paper: ClassVar[str] = "Tao et al., CVPR 2025, arXiv:2411.15024"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY
    whole: ClassVar[bool] = True
    needs: ClassVar[Need | None] = "video"

    pruned: float = 0.7
    dynamic: bool = True
    decode_layer: int | None = None
    decode_pruned: float = 0.7
    similarity: float = 0.9
    reference_quirks: bool = False

    def validate(self) -> None:
        for name in ("pruned", "decode_pruned", "similarity"):
            check_number(name, getattr(self, name), low=0.0, high=1.0)
        for name in ("dynamic", "reference_quirks"):
            check_flag(name, getattr(self, name))
        if self.decode_layer is not None:
            check_integer("decode_layer", self.decode_layer, low=0)

    @property
    def adaptive(self) -> bool:
        """Whether the count is the code's, of frames and their size: no budget is set."""
        return self.unbudgeted

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return self.before_llm(num_layers)

    def shares(self, whole: list[bool], size: int, num_keep: int) -> list[int]:
        """Count the tokens kept of each frame."""
        if self.unbudgeted:
            few = int((1 - self.pruned) * size)
            num_keep = min(num_keep, sum(size if stays else few for stays in whole))
        return frame_shares(whole, size, num_keep)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        video = frames(tokens, self.name)
        count, newlines = video.split(num_keep)
        reference, whole = references(len(video.places))
        x: Float[Tensor, "B F t D"] = video.of(upcast(tokens.features))
        change = 1 - F.cosine_similarity(x, x[:, reference], dim=3)
        shares = self.shares(whole, change.shape[2], count)
        rank = descending(change.flatten(0, 1)).argsort(dim=1).view_as(change)
        stays = rank < torch.tensor(shares, device=rank.device)[:, None]
        order = (~stays).flatten(1).to(torch.int8).argsort(dim=1, stable=True)
        return TokenPlan(keep=video.with_newlines(order[:, : sum(shares)], newlines))

    def decode_placement(self, num_layers: int) -> Placement | None:
        if not self.dynamic or 1.0 in (self.keep_ratio, self.mean_keep_ratio):
            return None
        if (layer := self.decode_layer) is None:
            layer = scaled_layer(FIRST_BEHIND, num_layers) - 1
        check_layer("decode_layer", layer, num_layers - 1, low=0)
        share = 1 - self.decode_pruned
        budget = Budget(keep_ratio=share, rounding="floor") if share else Budget(num_tokens=0)
        return Placement(stage=Stage.DECODE, budget=budget, layer=layer + 1, queries=Queries.LAST)

    def select_cached(self, attention: Tensor, before: Selection) -> Bool[Tensor, "B V"]:
        like = F.cosine_similarity(attention, before.attention, dim=1) >= self.similarity
        rank = descending(attention.masked_fill(~before.visual, -1.0)).argsort(dim=1)
        fresh = before.visual & (rank < before.num_keep[:, None])
        last = before.visual if self.reference_quirks else before.selected
        return torch.where((like & before.begun)[:, None], last, fresh)
