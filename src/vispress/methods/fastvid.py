"""FastVID: cut a video into scenes, keep what stands out, and fold the rest into anchor frames.

Shen et al., "FastVID: Dynamic Density Pruning for Fast Video Large Language Models", NeurIPS 2025,
arXiv:2503.11187.
Source: the authors' code (LunarShen/FastVID a40a109, MIT) and its vectors.
Follows the code, which has two rules (`variant`), for LLaVA-OneVision and for LLaVA-Video: a scene
ends at the 7 smallest cosines of adjacent frames and wherever they are below 0.9; 60 % of a frame's
share are its most attended tokens; the other shares of a scene go to anchors, every fourth frame
from its end: density peaks among the anchor's other tokens. All tokens of the scene that do not
stand out (`"video"`: but for the anchor's own centres) are assigned to each anchor's nearest centre
(cosine), and a centre keeps 0.6 of itself, or 1 / (n + 1) if that is more, beside the mean of its n
tokens. Without a budget counts are the code's: `"onevision"` loses what does not divide among
anchors, `"video"` shares out a scene's whole, remainders to earlier frames and to later anchors. A
newline stays where its row keeps a token.
Differs: the code reads SigLIP's pooling head, which Hugging Face models drop; reconstructed: frames
are compared by their mean token, and attention received in the encoder's feature layer ranks
tokens. With a budget (ours) counts are met exactly, newlines kept within them; where anchors cannot
hold their shares, they stand closer. A frame keeps a token at least, and fewer frames than scenes
or no merged tokens work, where the code fails. No noise in densities. Images pass whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vispress.budget import Rounding, allocate
from vispress.checks import check_choice, check_integer, check_number
from vispress.devices import sent
from vispress.methods._parts.clustering.density_peaks import dpc_scores
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods._parts.scoring.encoder_attention import encoder_attention
from vispress.methods._parts.video.frames import Frames, frames
from vispress.methods._parts.video.scenes import Scene, adjacent_cosine, dynamic_scenes
from vispress.methods.base import Compressor, Evidence, descending, upcast
from vispress.registry import register_method
from vispress.types import Need, Placement, Positions, Signal, TokenPlan, VisualTokens
from vispress_kernels import Backend
from vispress_kernels.assign_nearest import assign_nearest
from vispress_kernels.merge_tokens import merge_tokens

Variant = Literal["onevision", "video"]
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
    shares = evenly(total, len(anchors))
    return [(frame, share) for frame, share in zip(anchors, shares, strict=True) if share]


Shares = list[tuple[list[int], list[tuple[int, int]]]]
"""Of each scene: the most attended tokens of each frame, and anchors with their merged tokens."""


def published_shares(
    scenes: Sequence[Scene], size: int, few: int, context: float, step: int, variant: Variant
) -> Shares:
    """Count what the code keeps.

    Args:
        scenes: Runs of frames.
        size: Tokens of a frame.
        few: What a frame keeps on average.
        context: Fraction of that for merged tokens.
        step: Frames from anchor to anchor.
        variant: Of the code.
    """
    found: Shares = []
    for start, end in scenes:
        length = end - start
        anchors = range(length - 1, -1, -step)
        if variant == "onevision":
            merged = int(few * context)
            standing = [few - merged] * length
            each = [merged * length // len(anchors)] * len(anchors)
        else:
            merged = int(few * length * context)
            standing = list(evenly(few * length - merged, length))
            each = list(evenly(merged, len(anchors)))
        room = [size - standing[frame] for frame in anchors]
        shares = [min(own, most) for own, most in zip(each, room, strict=True)]
        found.append((standing, list(zip(anchors, shares, strict=True))))
    return found


def evenly(total: int, parts: int) -> tuple[int, ...]:
    """Split a count, what does not divide to the first parts."""
    return tuple(total // parts + (part < total % parts) for part in range(parts))


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

    A member goes to the peak with the most similar direction; `w = max(1 / (n + 1), alpha)`. A peak
    with no member stays as it is.
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
        retained: Without a budget: fraction kept of each frame, by the code's counts, in `[0, 1]`.
        variant: The code's rule that is followed: `"onevision"` or `"video"`.
        scenes: Scenes that are made in any case, at least 1.
        threshold: Cosine of adjacent frames below which a scene ends, in `[-1, 1]`.
        context: Fraction of what is kept for merged tokens, in `[0, 1]`.
        anchor_step: Frames from anchor to anchor, at least 1.
        alpha: What a centre keeps of itself at least, in `[0, 1]`.
    """

    summary: ClassVar[str] = "of videos: most attended, and density peaks that hold a scene's rest"
    paper: ClassVar[str] = "Shen et al., NeurIPS 2025, arXiv:2503.11187"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.COLUMN_ATTENTION}
    whole: ClassVar[bool] = True
    needs: ClassVar[Need | None] = "video"
    merges: ClassVar[bool] = True
    rounding: ClassVar[Rounding] = "floor"
    default_positions: ClassVar[Positions] = "original"

    retained: float = 0.1
    variant: Variant = "onevision"
    scenes: int = 8
    threshold: float = 0.9
    context: float = 0.4
    anchor_step: int = 4
    alpha: float = 0.6

    def validate(self) -> None:
        check_number("retained", self.retained, low=0.0, high=1.0)
        check_choice("variant", self.variant, get_args(Variant))
        check_integer("scenes", self.scenes, low=1)
        check_number("threshold", self.threshold, low=-1.0, high=1.0)
        check_number("context", self.context, low=0.0, high=1.0)
        check_integer("anchor_step", self.anchor_step, low=1)
        check_number("alpha", self.alpha, low=0.0, high=1.0)

    @property
    def adaptive(self) -> bool:
        """Whether the count is the code's: no budget is set."""
        return self.unbudgeted

    def uncapturable(self) -> str:
        return "the host cuts a video into scenes"

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return self.before_llm(num_layers)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        video = frames(tokens, self.name)
        x = video.of(upcast(tokens.features))
        with torch.no_grad():
            attention = encoder_attention(tokens, "column_mean")[:, video.places]
            alike = adjacent_cosine(x.mean(dim=2)).tolist()
        rows, kept = [], []
        for own, a, cosine in zip(x, attention, alike, strict=True):
            scenes = dynamic_scenes(cosine, self.scenes, self.threshold)
            values, places = self.kept(own, a, scenes, video, num_keep, tokens.backend)
            rows.append(values.flatten(0, 1))
            kept.append(places)
        whole = upcast(tokens.features)
        whole = whole.index_copy(1, video.places.flatten(), torch.stack(rows))
        most = max(map(len, kept))
        features = torch.stack(
            [
                F.pad(own[keep], (0, 0, 0, most - len(keep)))
                for own, keep in zip(whole, kept, strict=True)
            ]
        )
        alike_counts = all(len(keep) == most for keep in kept)
        keep = torch.stack(kept) if alike_counts else tuple(kept)
        return TokenPlan(keep=keep, features=features.to(tokens.features))

    def kept(
        self,
        x: Float[Tensor, "F t D"],
        attention: Float[Tensor, "F t"],
        scenes: list[Scene],
        video: Frames,
        num_keep: int,
        backend: Backend,
    ) -> tuple[Float[Tensor, "F t D"], Int[Tensor, "K"]]:
        """Change centres' values, and choose the tokens that one video keeps, newlines too."""
        if self.adaptive:
            shares = self.published(scenes, x.shape[1])
            values, places = self.fold_shares(x, attention, scenes, shares, backend)
            keep = video.with_row_newlines(places)
            if len(keep) <= num_keep:
                return values, keep
        count, newlines = video.split(num_keep)
        values, places = self.fold(x, attention, scenes, count, backend)
        return values, video.with_newlines(places[None], newlines)[0]

    def published(self, scenes: list[Scene], size: int) -> Shares:
        """Count what the code keeps of frames of `size` tokens, one each at least."""
        few = max(1, int(size * self.retained))
        return published_shares(scenes, size, few, self.context, self.anchor_step, self.variant)

    def fold(
        self,
        x: Float[Tensor, "F t D"],
        attention: Float[Tensor, "F t"],
        scenes: list[Scene],
        num_keep: int,
        backend: Backend = "auto",
    ) -> tuple[Float[Tensor, "F t D"], Int[Tensor, "K"]]:
        """Do the same for exactly `num_keep` tokens, without newlines."""
        number, size = attention.shape
        of_frames = allocate(num_keep, [size] * number)
        salient = num_keep // number - int(self.context * (num_keep // number))
        shares: Shares = []
        for start, end in scenes:
            length = end - start
            left = sum(of_frames[start:end]) - salient * length
            anchors = anchor_frames(length, left, size - salient, self.anchor_step)
            shares.append(([salient] * length, anchors))
        return self.fold_shares(x, attention, scenes, shares, backend)

    def fold_shares(
        self,
        x: Float[Tensor, "F t D"],
        attention: Float[Tensor, "F t"],
        scenes: list[Scene],
        shares: Shares,
        backend: Backend = "auto",
    ) -> tuple[Float[Tensor, "F t D"], Int[Tensor, "K"]]:
        """Change centres' values, and choose what a video keeps: places of all frames in a row."""
        number, size = attention.shape
        standing = [count for own, _ in shares for count in own]
        rank = descending(attention).argsort(dim=1)
        stands = rank < sent(torch.tensor(standing), x.device)[:, None]
        first = size * torch.arange(number, device=x.device)[:, None]
        # of each frame the places that do not stand out, ascending, then those that do
        order = stands.to(torch.int8).argsort(dim=1, stable=True) + first
        rest = [row[: size - count] for row, count in zip(order, standing, strict=True)]
        kept = [row[size - count :] for row, count in zip(order, standing, strict=True)]
        peaks, values, flat = list[Tensor](), list[Tensor](), x.flatten(0, 1)
        for (start, end), (_, anchors) in zip(scenes, shares, strict=True):
            members = torch.cat(rest[start:end])
            for frame, share in anchors:
                if not share:
                    continue
                own = rest[start + frame]
                chosen = own[centres(flat[own], share)]
                peaks.append(chosen)
                others = members
                if self.variant == "video":
                    others = members[~torch.isin(members, chosen)]
                values.append(fold_into(flat, chosen, others, self.alpha, backend))
        if values:
            flat = flat.index_copy(0, torch.cat(peaks), torch.cat(values))
        return flat.view_as(x), torch.cat([*kept, *peaks])
