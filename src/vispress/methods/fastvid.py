"""FastVID: cut a video into scenes, keep what stands out, and fold the rest into anchor frames.

Shen et al., "FastVID: Dynamic Density Pruning for Fast Video Large Language Models", NeurIPS 2025,
arXiv:2503.11187.
Source: the authors' code, read through a specification; no official vectors exist.
Follows the code: a scene ends at the 7 smallest cosines of adjacent frames and wherever they are
below 0.9; 60 % of a frame's share are its most attended tokens; the other shares of a scene go to
anchors, every fourth frame from its end: density peaks among the anchor's other tokens. All tokens
of the scene that do not stand out are assigned to each anchor's nearest centre (cosine), and a
centre keeps 0.6 of itself, or 1 / (n + 1) if that is more, beside the mean of its n tokens.
Differs: the code reads SigLIP's pooling head, which Hugging Face models drop; reconstructed: frames
are compared by their mean token, and attention received in the encoder's feature layer ranks
tokens. Shares that do not divide are not lost; where anchors cannot hold theirs, they stand closer.
No noise in densities. Newlines are kept within the budget. Images pass whole.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.budget import Rounding, allocate
from vispress.checks import check_integer, check_number
from vispress.methods._parts.clustering.density_peaks import dpc_scores
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods._parts.scoring.encoder_attention import encoder_attention
from vispress.methods._parts.video.frames import frames
from vispress.methods._parts.video.scenes import Scene, adjacent_cosine, dynamic_scenes
from vispress.methods.base import Compressor, Evidence, descending, top_indices, upcast
from vispress.registry import register_method
from vispress.types import Need, Placement, Positions, Signal, Stage, TokenPlan, VisualTokens
from vispress_kernels import Backend
from vispress_kernels.assign_nearest import assign_nearest
from vispress_kernels.merge_tokens import merge_tokens

NEIGHBOURS = 4
"""Tokens that a density looks at, itself included."""


def anchor_frames(length: int, total: int, room: int, step: int) -> list[tuple[int, int]]:
    """Choose the frames of a scene that hold merged tokens, the last first, and their shares.

    Args:
        length: Frames of the scene.
        total: Merged tokens of the scene, at most `length * room`; what does not divide goes to
            later frames.
        room: Tokens of a frame that can be merged into.
        step: Frames from anchor to anchor; fewer where anchors would be too few for `total`.
    """
    while step > 1 and -(-length // step) * room < total:
        step -= 1
    anchors = range(length - 1, -1, -step)
    shares = [total // len(anchors) + (i < total % len(anchors)) for i in range(len(anchors))]
    return [(frame, share) for frame, share in zip(anchors, shares, strict=True) if share]


@torch.no_grad()
def centres(x: Float[Tensor, "n D"], count: int) -> Int[Tensor, "C"]:
    """Find the tokens with the largest density times distance to a denser one."""
    density, distance = dpc_scores(x[None], NEIGHBOURS)
    return descending(density * distance)[0, :count]


def fold_into(
    x: Float[Tensor, "N D"],
    peaks: Int[Tensor, "C"],
    members: Int[Tensor, "m"],
    alpha: float,
    backend: Backend = "auto",
) -> Float[Tensor, "C D"]:
    """Compute new values of peaks: `w` of themselves, `1 - w` of the mean of their n members.

    A member goes to the peak with the most similar direction; `w = max(1 / (n + 1), alpha)`.
    """
    own = x[members][None]
    nearest, _ = assign_nearest(own, x[peaks][None], backend=backend)
    mean = merge_tokens(own, nearest, len(peaks), reduce="mean", backend=backend)[0]
    count = torch.zeros_like(peaks).scatter_add(0, nearest[0], torch.ones_like(members))
    weight = (1 / (count + 1).to(x)).clamp(min=alpha)[:, None]
    return weight * x[peaks] + (1 - weight) * mean


@final
@register_method("fastvid")
@dataclass(frozen=True, kw_only=True)
class FastVID(Compressor):
    """Prune and merge videos before the LLM; the question plays no part.

    Args:
        scenes: Scenes that are made in any case, at least 1.
        threshold: Cosine of adjacent frames below which a scene ends, in `[-1, 1]`.
        context: Fraction of the budget for merged tokens, in `[0, 1]`.
        anchor_step: Frames from anchor to anchor, at least 1.
        alpha: What a centre keeps of itself at least, in `[0, 1]`.
    """

    summary: ClassVar[str] = "of videos: most attended, and density peaks that hold a scene's rest"
    paper: ClassVar[str] = "Shen et al., NeurIPS 2025, arXiv:2503.11187"
    evidence: ClassVar[Evidence] = "reconstructed"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.COLUMN_ATTENTION}
    whole: ClassVar[bool] = True
    needs: ClassVar[Need | None] = "video"
    merges: ClassVar[bool] = True
    rounding: ClassVar[Rounding] = "floor"
    default_positions: ClassVar[Positions] = "original"

    scenes: int = 8
    threshold: float = 0.9
    context: float = 0.4
    anchor_step: int = 4
    alpha: float = 0.6

    def validate(self) -> None:
        check_integer("scenes", self.scenes, low=1)
        check_number("threshold", self.threshold, low=-1.0, high=1.0)
        check_number("context", self.context, low=0.0, high=1.0)
        check_integer("anchor_step", self.anchor_step, low=1)
        check_number("alpha", self.alpha, low=0.0, high=1.0)

    def uncapturable(self) -> str:
        return "the host cuts a video into scenes"

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        video = frames(tokens, self.name)
        count, newlines = video.split(num_keep)
        x = video.of(upcast(tokens.features))
        with torch.no_grad():
            attention = encoder_attention(tokens, "column_mean")[:, video.places]
            alike = adjacent_cosine(x.mean(dim=2)).tolist()
        rows, kept = [], []
        for own, a, cosine in zip(x, attention, alike, strict=True):
            scenes = dynamic_scenes(cosine, self.scenes, self.threshold)
            values, places = self.fold(own, a, scenes, count, tokens.backend)
            rows.append(values.flatten(0, 1))
            kept.append(places)
        keep = video.with_newlines(torch.stack(kept), newlines)
        whole = upcast(tokens.features)
        whole = whole.index_copy(1, video.places.flatten(), torch.stack(rows))
        index = torch.arange(tokens.batch, device=keep.device)[:, None]
        return TokenPlan(keep=keep, features=whole[index, keep].to(tokens.features))

    def fold(
        self,
        x: Float[Tensor, "F t D"],
        attention: Float[Tensor, "F t"],
        scenes: list[Scene],
        num_keep: int,
        backend: Backend = "auto",
    ) -> tuple[Float[Tensor, "F t D"], Int[Tensor, "K"]]:
        """Change centres' values, and choose what a video keeps: places of all frames in a row."""
        number, size = attention.shape
        shares = allocate(num_keep, [size] * number)
        salient = num_keep // number - int(self.context * (num_keep // number))
        standing = top_indices(attention, salient)
        rest = top_indices(torch.zeros_like(attention).scatter(1, standing, -1.0), size - salient)
        first = size * torch.arange(number, device=x.device)[:, None]
        kept, values, flat = [(standing + first).flatten()], [], x.flatten(0, 1)
        for start, end in scenes:
            left = sum(shares[start:end]) - salient * (end - start)
            own = (rest + first)[start:end]
            for frame, share in anchor_frames(end - start, left, own.shape[1], self.anchor_step):
                peaks = own[frame, centres(flat[own[frame]], share)]
                kept.append(peaks)
                values.append(fold_into(flat, peaks, own.flatten(), self.alpha, backend))
        if values:
            flat = flat.index_copy(0, torch.cat(kept[1:]), torch.cat(values))
        return flat.view_as(x), torch.cat(kept)
