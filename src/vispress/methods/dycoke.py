"""DyCoke: of a video, keep some frames whole, and in others what is least like the whole ones.

Tao et al., "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", CVPR 2025,
arXiv:2411.15024.
Source: the authors' code, read through a specification; no official vectors exist.
Follows the code: temporal token merging, which prunes. In windows of four frames the second and
fourth keep the three tenths that are least like (cosine) the first and third, and the third what is
least like the first; the third of the last window stays whole. Without a budget the count is that.
Differs: the other half of DyCoke, which picks again at every decoding step what deeper layers see
of the cache, is not here: the runtime picks at prefill only, and `dynamic` is refused. A budget
(ours) is met by what pruned frames keep; one that whole frames alone exceed is shared out over
these, by change since the whole frame before (the first: until the next frame). Raster order (the
code leaves the order of its ranking). Newlines are kept within the budget. Images pass whole.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vispress.budget import allocate
from vispress.errors import UnsupportedMethodError
from vispress.methods.base import Compressor, Evidence, descending, upcast
from vispress.methods.checks import check_flag, check_number
from vispress.methods.segments import GEOMETRY
from vispress.methods.videos import frames
from vispress.registry import register_method
from vispress.types import Need, Placement, Signal, TokenPlan, VisualTokens


def references(number: int) -> tuple[list[int], list[bool]]:
    """For each frame, the one it is compared with, and whether it is one of those that stay whole.

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
    """How many of `size` tokens each frame keeps: whole frames first, the others alike."""
    main = allocate(num_keep, [size if stays else 0 for stays in whole])
    rest = allocate(num_keep - sum(main), [0 if stays else size for stays in whole])
    return [a + b for a, b in zip(main, rest, strict=True)]


@final
@register_method("dycoke")
@dataclass(frozen=True, kw_only=True)
class DyCoke(Compressor):
    """Prune videos before the LLM, by similarity to frames that stay whole.

    Args:
        pruned: Without a budget: fraction dropped of each frame that is pruned, in `[0, 1]`.
        dynamic: The code's selection at every decoding step; refused, as nothing here does it.
    """

    summary: ClassVar[str] = "of videos: some whole frames, of others what is least like them"
    paper: ClassVar[str] = "Tao et al., CVPR 2025, arXiv:2411.15024"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY
    needs: ClassVar[Need | None] = "video"

    pruned: float = 0.7
    dynamic: bool = False

    def validate(self) -> None:
        check_number("pruned", self.pruned, low=0.0, high=1.0)
        check_flag("dynamic", self.dynamic)
        if self.dynamic:
            raise UnsupportedMethodError(
                "dynamic=True (dycoke's new choice of cached tokens at every decoding step) is not "
                "supported: tokens are chosen at prefill only; leave it out, or chain dycoke with "
                "an in-LLM method (fastv, say) to shorten the cache of deeper layers"
            )

    @property
    def adaptive(self) -> bool:
        """Whether the count is the code's, of frames and their size: no budget is set."""
        return self.unbudgeted

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return self.before_llm(num_layers)

    def shares(self, whole: list[bool], size: int, num_keep: int) -> list[int]:
        """Tokens kept of each frame."""
        if self.adaptive:
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
