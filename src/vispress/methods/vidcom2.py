"""VidCom2: of a video, keep the tokens least like their frame's mean and the video's.

Liu et al., "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large
Language Models", EMNLP 2025, arXiv:2505.14454.
Source: the authors' code (xuyang-liu16/VidCom2 944a17d, Apache-2.0) and its vectors.
Follows the code: the half of the channels that varies least over the video; unit tokens; a sum of
five Gaussians tells how near a token is to the mean of the video and of its frame; frames that are
far from the video's mean on average get more of the budget (softmax at temperature 0.01); in each
frame the tokens with the smallest sum of both are kept, one at least.
Differs: the code rounds each frame's count and so misses the budget by a few tokens, and a ratio of
1 drops some, too (8 of 64 in the vectors); here all frames' counts move by one common amount before
they are rounded, until the sum is exact. At the code's count the same tokens are kept. Its file for
Qwen2-VL takes tokens for indices at this commit, and is not followed. Newlines are kept within the
budget. Images pass whole.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.checks import check_number
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods._parts.scoring.cosines import unit
from vispress.methods._parts.video.frames import frames
from vispress.methods.base import Compressor, Evidence, descending, top_indices, upcast
from vispress.registry import register_method
from vispress.types import Need, Placement, Signal, Stage, TokenPlan, VisualTokens

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)


def steady_channels(x: Float[Tensor, "B F t D"]) -> Float[Tensor, "B F t C"]:
    """Select the half of the channels with the lowest variance over the video's tokens."""
    variance = x.flatten(1, 2).var(dim=1, correction=0)
    index = top_indices(-variance, max(1, x.shape[3] // 2))
    return x.gather(3, index[:, None, None].expand(*x.shape[:3], -1))


def nearness(x: Float[Tensor, "B F t C"], centre: Tensor) -> Float[Tensor, "B F t"]:
    """Sum Gaussians of the distance to a centre; low = distinctive."""
    square = (x - centre).square().sum(dim=3)
    return torch.stack([(-square / (2 * width)).exp() for width in WIDTHS]).sum(dim=0)


def scores(x: Float[Tensor, "B F t C"]) -> tuple[Float[Tensor, "B F t"], Float[Tensor, "B F"]]:
    """Rate each token's nearness to video and frame (low = kept), and each frame."""
    x = unit(x)
    video = nearness(x, x.mean(dim=(1, 2), keepdim=True))
    return video + nearness(x, x.mean(dim=2, keepdim=True)), -video.mean(dim=2)


def frame_ratios(
    frame: Float[Tensor, "B F"], ratio: float, temperature: float
) -> Float[Tensor, "B F"]:
    """Give each frame the share of its tokens that it keeps, at most 1."""
    p = torch.softmax(frame / temperature, dim=1)
    return (ratio * (1 + p - p.mean(dim=1, keepdim=True))).clamp(max=1)


def spread(
    score: Float[Tensor, "B F t"], ratios: Float[Tensor, "B F"], num_keep: int
) -> Int[Tensor, "B K"]:
    """Keep the lowest of each frame, by its ratio: places of all frames in a row, ascending.

    The j-th token of a frame that should keep k of them (no integer) comes in the order of `k - j`:
    with the published sum, this is `round(k)`. One token a frame comes first.
    """
    size = score.shape[2]
    rank = descending((-score).flatten(0, 1)).argsort(dim=1).view_as(score)
    order = ratios[..., None] * size - rank
    order = torch.where(rank == 0, order + score[0].numel(), order)
    return top_indices(order.flatten(1), num_keep)


@final
@register_method("vidcom2")
@dataclass(frozen=True, kw_only=True)
class VidCom2(Compressor):
    """Prune videos before the LLM, by distance from means; the question plays no part.

    Args:
        temperature: Of the softmax over frames, above 0; large: every frame keeps as much.
    """

    summary: ClassVar[str] = "of videos: least like the mean of their frame and of the video"
    paper: ClassVar[str] = "Liu et al., EMNLP 2025, arXiv:2505.14454"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY
    whole: ClassVar[bool] = True
    needs: ClassVar[Need | None] = "video"

    temperature: float = 0.01

    def validate(self) -> None:
        check_number("temperature", self.temperature, low=1e-6)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        video = frames(tokens, self.name)
        count, newlines = video.split(num_keep)
        token, frame = scores(steady_channels(video.of(upcast(tokens.features))))
        ratios = frame_ratios(frame, count / token[0].numel(), self.temperature)
        return TokenPlan(keep=video.with_newlines(spread(token, ratios, count), newlines))
