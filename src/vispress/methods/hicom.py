"""HICom: windows and learned queries that an instruction guides take the place of visual tokens.

Liu et al., "Hybrid-Level Instruction Injection for Video Token Compression in Multi-modal Large
Language Models", CVPR 2025, arXiv:2503.16036.
Source: the paper and the authors' code, read through a specification; no official vectors exist.
Follows: a local branch, in which each window of 4 frames x 3 x 3 tokens (images: 3 x 3) becomes
what one query finds in it (one head, no projections), and a global one, in which 32 learned queries
attend to all tokens (heads of 128, 3-D sinusoids added to keys, the queries added to what they
find). The instruction takes the place of the local queries ("direct"), which are otherwise the map,
resized; or it scales and shifts normalised queries ("coarse"); or they attend to its words
("fine"). The local tokens come first, then the global ones.
Differs: both are read out by the model's own projector, in LLaVA the same two layers, so that the
compressor starts from what the model knows; train it along, and save it with the model. Keys are
the value features (the projector's input, in videos of LLaVA-OneVision behind the pooling), for
none of the families has patches in the space of a text encoder. Values have no positions (as in the
paper; the code adds them there, too). Adapters and the contrastive scale are left out. New tokens
stand at the centres of windows and, the global ones, at the last other places of the image, in
order; with `compact` positions that is the numbering of the short sequence, which the paper has.
Newlines stay. A budget chooses the window's side, and cuts global tokens to half of it.
Reconstructed: the condition is the mean of the prompt's text behind the image, in the LLM's input
embeddings, through a learned norm and two layers (the paper: a text encoder's embedding, without
the choices of a question); later turns keep that of the turn in which the image came. Learned
queries begin at a deviation of 0.02 (zeros would make all of them the same token), scales and
shifts at none. AnyRes crops are windowed one by one and follow each other in time for the global
queries; where the image holds fewer places than tokens, the last global ones go.
No gradient reaches the text's embeddings. Untrained, windows are mixed at random and global tokens
mean nothing; nobody ships weights for these families.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vispress.checks import check_choice, check_integer
from vispress.devices import sent
from vispress.errors import BudgetError, ConfigError
from vispress.methods._parts.geometry.clips import (
    Arrangement,
    Clip,
    arranged,
    clips,
    coordinates,
    num_windows,
)
from vispress.methods._parts.geometry.grids import signals_for
from vispress.methods._parts.networks.layers import CrossAttention, Dense, Norm
from vispress.methods._parts.scoring.question import question
from vispress.methods.base import Compressor, Evidence, segment_shares, upcast
from vispress.precision import full_precision
from vispress.registry import register_method
from vispress.types import ModuleShape, Placement, Signal, TokenPlan, VisualTokens

SIDE = 3
SPREAD = 0.02
Local = Literal["off", "direct", "coarse", "fine"]
Global = Literal["off", "coarse", "fine"]


def sinusoids(at: Int[Tensor, "n 3"], width: int) -> Float[Tensor, "n D"]:
    """Encode time, row and column by sines and cosines, a third of the width each, fp32.

    Of rates `10000 ** -(i / count)`; what does not divide by 6 is left 0.
    """
    count = width // 6
    rates = 10000.0 ** -(torch.arange(count, device=at.device) / max(1, count))
    angles = at[..., None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return F.pad(waves, (0, width - waves.shape[1]))


class Injection(nn.Module):
    """Let a condition guide queries: scale and shift them, or let them attend to words.

    Args:
        width: Of queries and words.
        kind: `"coarse"` or `"fine"`.
    """

    def __init__(self, width: int, kind: Literal["coarse", "fine"]) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.attend = CrossAttention(width, std=SPREAD) if kind == "fine" else None
        self.change = None
        if kind == "coarse":
            self.change = nn.Sequential(
                Dense(width, width), nn.GELU(), Dense(width, 2 * width, zero=True)
            )

    def forward(
        self, queries: Float[Tensor, "B M D"], words: Float[Tensor, "B T D"]
    ) -> Float[Tensor, "B M D"]:
        """Change queries; the first of the words is their mean, which "coarse" reads alone."""
        if self.attend is not None:
            changed = queries + self.attend(queries, words[:, 1:], words[:, 1:])
        else:
            assert self.change is not None
            scale, shift = self.change(words[:, :1]).chunk(2, dim=-1)
            changed = queries * (1 + scale) + shift
        normed: Tensor = self.norm(changed)
        return normed


def _injection(width: int, kind: str) -> Injection | None:
    return Injection(width, kind) if kind in ("coarse", "fine") else None  # type: ignore[arg-type]


class HybridCompressor(nn.Module):
    """Make local and global tokens of features, in their space.

    Args:
        width_text: Of words.
        width: Of features.
        local: Injection of the local branch.
        whole: Of the global one.
        num_global: Learned queries.
    """

    def __init__(
        self, width_text: int, width: int, *, local: Local, whole: Global, num_global: int
    ) -> None:
        super().__init__()
        self.direct = local == "direct"
        self.condition = None
        if local != "off" or (whole != "off" and num_global):
            self.condition = nn.Sequential(
                Norm(width_text), Dense(width_text, width), nn.GELU(), Dense(width, width)
            )
        self.local = _injection(width, local)
        self.whole = _injection(width, whole) if num_global else None
        self.attend = CrossAttention(width, std=SPREAD) if num_global else None
        self.queries = None
        if num_global:
            self.queries = nn.Parameter(torch.empty(num_global, width))
            nn.init.trunc_normal_(self.queries, std=SPREAD)

    def forward(
        self,
        features: Float[Tensor, "B N D"],
        text: Float[Tensor, "B T E"],
        found: Sequence[Clip],
        at: Int[Tensor, "n 4"],
        num_global: int,
    ) -> Float[Tensor, "B M D"]:
        """Compress images, in at least fp32: a token a window, clip by clip, then global ones.

        Args:
            features: All tokens of images.
            text: Words of the instruction; T may be 0.
            found: Clips in windows; none for no local tokens.
            at: Tokens that show a picture, each with its time, row and column.
            num_global: The first so many queries.
        """
        with full_precision():  # training runs it outside of a plan, perhaps under autocast
            x, words = upcast(features), self._words(text)
            out = [self._windowed(x, words, clip) for clip in found]
            if num_global:
                out.append(self._global(x, words, sent(at, x.device), num_global))
            return torch.cat(out, dim=1)

    def _words(self, text: Tensor) -> Tensor:
        """The mean of the words, or zeros where there are none, then the words; mapped."""
        text = upcast(text)
        mean = text.sum(dim=1, keepdim=True) / max(1, text.shape[1])
        if self.condition is None:
            return mean
        mapped: Tensor = self.condition(torch.cat([mean, text], dim=1))
        return mapped

    def _windowed(self, x: Tensor, words: Tensor, clip: Clip) -> Tensor:
        members = x[:, sent(clip.members(), x.device)]
        if self.direct:
            queries = words[:, :1].expand(-1, members.shape[1], -1)
        else:
            queries = clip.resized(x)
            queries = queries if self.local is None else self.local(queries, words)
        logits = torch.einsum("bmd,bmkd->bmk", queries, members) / math.sqrt(x.shape[-1])
        return torch.einsum("bmk,bmkd->bmd", logits.softmax(dim=-1), members)

    def _global(self, x: Tensor, words: Tensor, at: Tensor, count: int) -> Tensor:
        assert self.queries is not None
        assert self.attend is not None
        x = x[:, at[:, 0]]
        queries = self.queries[:count].to(x).expand(len(x), -1, -1)
        if self.whole is not None:
            queries = self.whole(queries, words)
        keys = x + sinusoids(at[:, 1:], x.shape[-1]).to(x)
        found: Tensor = self.attend(queries, keys, x)
        return queries + found


@final
@register_method("hicom")
@dataclass(frozen=True, kw_only=True)
class HICom(Compressor):
    """Compress before the LLM, guided by the instruction; without a budget in windows of one side.

    A budget that has no room for a window a sub-image (or run of frames) has global tokens alone.

    Args:
        local_injection: Into local queries: `"off"`, `"direct"`, `"coarse"` or `"fine"`.
        global_injection: Into global queries: `"off"`, `"coarse"` or `"fine"` (direct would make
            them one).
        num_global: Learned queries, at least 0.
        side: Rows and columns of a window, at least 1; None for 3, or what the budget chooses.
        frames: Frames of a window, at least 1.

    Raises:
        ConfigError: A value is out of range, or nothing is left to train.
    """

    summary: ClassVar[str] = "windows and learned queries, guided by the instruction"
    paper: ClassVar[str] = "Liu et al., CVPR 2025, arXiv:2503.16036"
    evidence: ClassVar[Evidence] = "reconstructed"
    reads: ClassVar[frozenset[Signal]] = signals_for("vision_features") | {Signal.TEXT_EMBEDDINGS}
    whole: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    merges: ClassVar[bool] = True
    trained: ClassVar[bool] = True
    untrained: ClassVar[str] = "it mixes windows at random"

    local_injection: Local = "direct"
    global_injection: Global = "coarse"
    num_global: int = 32
    side: int | None = None
    frames: int = 4

    def validate(self) -> None:
        check_choice("local_injection", self.local_injection, get_args(Local))
        check_choice("global_injection", self.global_injection, get_args(Global))
        check_integer("num_global", self.num_global, low=0)
        check_integer("frames", self.frames, low=1)
        if self.side is not None:
            check_integer("side", self.side, low=1)
            if not self.unbudgeted:
                raise ConfigError(f"a budget chooses the side, got side={self.side} too; give one")
        if self.local_injection == "off" and not self.num_global:
            raise ConfigError(
                "nothing is trained with local_injection='off' and num_global=0; give an injection "
                "or num_global of at least 1 (avg_pool is without parameters)"
            )

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return self.before_llm(num_layers)

    def make_module(self, shape: ModuleShape) -> HybridCompressor:
        return HybridCompressor(
            shape.width,
            shape.vision_width,
            local=self.local_injection,
            whole=self.global_injection,
            num_global=self.num_global,
        )

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        """Gradients flow through the new values, to the encoder and the parameters."""
        assert tokens.module is not None  # `trained`
        assert tokens.vision_features is not None  # declared in `reads`
        assert tokens.projector is not None
        own, x, device = self.arrange(tokens, num_keep), tokens.vision_features, tokens.index.device
        mixed: Tensor = tokens.module(x, question(tokens), own.local, own.at, own.num_global)
        made = tokens.projector(mixed.to(x.dtype)).to(tokens.features.dtype)
        stay = tokens.features[:, sent(own.newlines, device)]
        values = torch.cat([made, stay], dim=1)[:, sent(own.order, device)]
        return TokenPlan(keep=sent(own.keep, device).expand(tokens.batch, -1), features=values)

    def arrange(self, tokens: VisualTokens, num_keep: int) -> Arrangement:
        """Choose windows and places for an image.

        Raises:
            UnsupportedMethodError: The tokens are no full grids.
            BudgetError: There is room neither for windows nor for global tokens.
        """
        segments = tokens.segments()[0]
        stay = segment_shares(segments, num_keep).get(-1, 0)
        newlines = torch.where(segments < 0)[0][:stay]
        room = num_keep - stay
        first = self.side or (SIDE if self.unbudgeted else 1)
        local = clips(tokens, (self.frames, first, first))
        at = coordinates(local)
        kept_free = 0 if self.unbudgeted else min(self.num_global, room // 2)
        for side in range(first, max(first, *(max(clip.size[1:]) for clip in local)) + 1):
            local = tuple(replace(clip, window=(self.frames, side, side)) for clip in local)
            if (few := num_windows(local)) <= room - kept_free:
                return arranged(local, at, min(self.num_global, room - few), newlines)
        if not self.num_global:
            raise BudgetError(
                f"a budget of {num_keep} tokens has no room for {num_windows(local)} windows, one "
                f"a sub-image or run of {self.frames} frames; give more, or num_global >= 1"
            )
        return arranged((), at, min(self.num_global, room), newlines)
