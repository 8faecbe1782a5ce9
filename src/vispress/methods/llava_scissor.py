"""LLaVA-Scissor: means of semantic components, of each frame and then of all frames.

Sun et al., "LLaVA-Scissor: Token Compression with Semantic Connected Components for Video LLMs",
2025, arXiv:2506.21862.
Source: https://github.com/HumanMLLM/LLaVA-Scissor at b63354c (CC BY-NC 4.0).
Follows the code: projected tokens of a frame are linked where their cosine is above `tau`; each
connected component becomes its mean; the means of all frames are joined in the same way; then every
original token is added to the result that is most similar to it, which is divided by one more than
their number. Results stand in the order of each component's best-connected member (of equals the
first).
Differs: components are whole. The code samples links (of more than 3,233 tokens; of fewer it takes
all), and its union-find counts members of long chains nowhere. Newlines stay within the budget (the
code drops them).
Reconstructed: with a budget `tau` is lowered until as many results are left, or fewer.
The second step compares all means with each other, by definition: time grows with their square.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from vispress.checks import check_number
from vispress.methods._parts.clustering.owners import ragged
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods._parts.scoring.cosines import unit
from vispress.methods._parts.video.frames import Frames, frames
from vispress.methods.base import Compressor, Evidence, upcast
from vispress.registry import register_method
from vispress.types import Need, Placement, Signal, TokenPlan, VisualTokens
from vispress_kernels import Backend
from vispress_kernels.assign_nearest import assign_nearest
from vispress_kernels.merge_tokens import merge_tokens

ROWS = 1024
"""Tokens whose links are followed at a time."""
HALVINGS = 14
"""Of the range of `tau`, where a budget is given."""


def components(linked: Bool[Tensor, "b n n"]) -> Int[Tensor, "b n"]:
    """Find for each token the best-connected member of its component, of equals the first."""
    b, n, _ = linked.shape
    place = torch.arange(n, device=linked.device)
    first = place.int().expand(b, n)
    while True:  # the lowest number runs along the links, and ahead by what it has reached
        reached = torch.cat(
            [
                torch.where(rows, first[:, None], n).amin(dim=2)
                for rows in torch.split(linked, ROWS, dim=1)
            ],
            dim=1,
        )
        reached = torch.minimum(reached, first)
        reached = reached.gather(1, reached.long())
        if torch.equal(reached, first):
            break
        first = reached
    root = first.long()
    rank = linked.sum(dim=2) * n + (n - 1 - place)
    best = torch.zeros_like(rank).scatter_reduce_(1, root, rank, "amax")
    return (n - 1 - best % n).gather(1, root)


@dataclass(frozen=True)
class Joined:
    """What becomes of the tokens of a video, frame by frame; all on the device.

    Args:
        keep: `[K]`, token that stands for each result, ascending.
        first: `[n]`, mean of its frame that each token is part of.
        second: `[m]`, result that each of these means is part of.
    """

    keep: Int[Tensor, "K"]
    first: Int[Tensor, "n"]
    second: Int[Tensor, "m"]


def _numbered(owner: Int[Tensor, "n"]) -> tuple[Int[Tensor, "K"], Int[Tensor, "n"]]:
    """List owners, and give the place of each token's in that list."""
    own = owner == torch.arange(len(owner), device=owner.device)
    return own.nonzero()[:, 0], (own.cumsum(dim=0) - 1)[owner]


def mean_of(
    x: Float[Tensor, "n D"], into: Int[Tensor, "n"], count: int, backend: Backend
) -> Float[Tensor, "m D"]:
    """Average tokens group by group (differentiable)."""
    return merge_tokens(x[None], into[None], count, reduce="mean", backend=backend)[0]


def join(x: Float[Tensor, "F t D"], tau: float, backend: Backend = "auto") -> Joined:
    """Join tokens within frames, then the means of all frames."""
    F, t, _ = x.shape
    u = unit(x)
    owner = components(u @ u.mT > tau) + t * torch.arange(F, device=x.device)[:, None]
    stands, first = _numbered(owner.flatten())
    means = unit(mean_of(x.flatten(0, 1), first, len(stands), backend))
    linked = torch.cat([rows @ means.mT > tau for rows in torch.split(means, ROWS)])
    kept, second = _numbered(components(linked[None])[0])
    return Joined(stands[kept], first, second)


def values(
    x: Float[Tensor, "n D"], joined: Joined, backend: Backend = "auto"
) -> Float[Tensor, "K D"]:
    """Compute the results (differentiable): means of means, and what is closest to each."""
    count = len(joined.keep)
    means = mean_of(x, joined.first, len(joined.second), backend)
    results = mean_of(means, joined.second, count, backend)
    closest, _ = assign_nearest(x.detach()[None], results.detach()[None], backend=backend)
    added = merge_tokens(x[None], closest, count, backend=backend)[0]
    ones = torch.ones_like(closest[0], dtype=x.dtype)
    number = torch.zeros(count, dtype=x.dtype, device=x.device).scatter_add_(0, closest[0], ones)
    return (results + added) / (1 + number)[:, None]


@final
@register_method("llava_scissor")
@dataclass(frozen=True, kw_only=True)
class LLaVAScissor(Compressor):
    """Merge videos before the LLM, by connected components; without a budget `tau` decides.

    Args:
        tau: Cosine above which tokens are linked, in `[-1, 1]`; with a budget the highest that is
            tried.
    """

    summary: ClassVar[str] = "means of connected components, of each frame and then of all"
    paper: ClassVar[str] = "Sun et al. 2025, arXiv:2506.21862"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY
    needs: ClassVar[Need | None] = "video"
    whole: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    merges: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True
    """Counts hang on the video, with a budget too."""

    tau: float = 0.9

    def validate(self) -> None:
        check_number("tau", self.tau, low=-1.0, high=1.0)

    def uncapturable(self) -> str:
        return "videos decide how many components there are"

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return self.before_llm(num_layers)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        found = frames(tokens, self.name)
        most, newlines = found.split(num_keep)
        rows = [self.of_video(tokens, row, found, newlines, most) for row in range(tokens.batch)]
        counts = [len(keep) for keep, _ in rows]
        longest = max(counts)
        keep = torch.stack([pad(own, (0, longest - len(own))) for own, _ in rows])
        features = torch.stack([pad(own, (0, 0, 0, longest - len(own))) for _, own in rows])
        return TokenPlan(keep=ragged(keep, counts), features=features.to(tokens.features.dtype))

    def of_video(
        self, tokens: VisualTokens, row: int, found: Frames, newlines: Tensor, most: int
    ) -> tuple[Tensor, Tensor]:
        """Give what a video keeps, ascending, and its values."""
        x = upcast(tokens.features[row])
        pictures = x[found.places]
        with torch.no_grad():
            joined = self.within(pictures.detach(), most, tokens.backend)
        merged = values(pictures.flatten(0, 1), joined, tokens.backend)
        keep = torch.cat([found.places.flatten()[joined.keep], newlines])
        keep, order = keep.sort()
        return keep, torch.cat([merged, x[newlines]])[order]

    def within(self, x: Float[Tensor, "F t D"], most: int, backend: Backend) -> Joined:
        """Join with the highest threshold, up to `tau`, that leaves at most so many."""
        at = partial(join, x, backend=backend)
        best = at(self.tau)
        if len(best.keep) <= most:
            return best
        low, high, best = -1.0, self.tau, at(-1.01)  # all of them joined
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            tried = at(middle)
            if len(tried.keep) <= most:
                low, best = middle, tried
            else:
                high = middle
        return best
