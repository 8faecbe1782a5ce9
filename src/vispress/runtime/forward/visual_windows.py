"""Let visual tokens see, of visual tokens, only those around them in their grid."""

from functools import cached_property
from typing import NamedTuple, final

import torch
from torch import Tensor

from vispress.devices import sent
from vispress.errors import UnsupportedMethodError
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.tokens import masks
from vispress.runtime.tokens.images import Image
from vispress.runtime.tokens.live_tokens import LiveTokens

NOWHERE = -1
"""Number of the picture of a token that has no cell in one: text, and newlines of an image."""


class Window(NamedTuple):
    """What a visual token sees of visual tokens.

    Args:
        size: Side of the square of cells around its own, odd.
        causal: Whether it sees only those of them that stand before it.
    """

    size: int
    causal: bool


class _Made(NamedTuple):
    """A mask that was made, and what of."""

    mask: Tensor | None
    rows: LiveTokens
    narrowed: Tensor


@final
class VisualWindows:
    """The windows of one call that begins a sequence.

    Args:
        state: The call.
        name: Of the method, for messages.
    """

    def __init__(self, state: ForwardState, name: str) -> None:
        self.state, self.name = state, name
        # layers of one kind are handed one mask; the last one alone is held
        self._made: dict[tuple[str, Window], _Made] = {}

    @cached_property
    def cells(self) -> Tensor:
        """`[B, Q, 3]` int64 on the host: picture of a token, counted in the call, row and column.

        Raises:
            UnsupportedMethodError: The model does not say where an image's tokens stand.
        """
        cells = torch.full((*self.state.rows[0][1].index.shape, 3), NOWHERE)
        pictures = 0
        for image in self.state.images:
            own = self._of(image)
            own[:, 0] += torch.where(own[:, 0] >= 0, pictures, 0)
            pictures = max(pictures, int(own[:, 0].max()) + 1)
            cells[image.sample, image.positions] = own
        return cells

    def _of(self, image: Image) -> Tensor:
        """`[N0, 3]`: sub-image or frame, row and column of an image's tokens."""
        if (crops := image.crops) is not None:
            return torch.stack([crops.segment, crops.row, crops.col], dim=1)
        if image.grid is None:
            raise UnsupportedMethodError(
                f"{self.name}: an image of {image.num_visual} tokens has no known grid, in which "
                "its windows would lie; set window=None"
            )
        return torch.cartesian_prod(*(torch.arange(size) for size in image.grid))

    def narrow(
        self, number: int, query: Tensor, key: Tensor, mask: Tensor | None, window: Window
    ) -> Tensor:
        """Give the mask of a decoder layer with what its visual rows see of visual tokens.

        Args:
            number: The layer.
            query: `[B, H, P, D]`.
            key: `[B, Hkv, S, D]`, S at least P (a static buffer has room behind).
            mask: `[B or 1, H or 1, P, S]`, bool (True = attend) or additive; None for causality.
            window: What is seen.
        """
        rows = self.state.rows_at(number).to(query.device)
        kind = self.state.plan.layer_types[number], window
        made = self._made.get(kind)
        if made is None or made.mask is not mask or made.rows is not rows:
            narrowed = self._narrowed(rows, query, key.shape[2], mask, window)
            made = self._made[kind] = _Made(mask, rows, narrowed)
        return made.narrowed

    def _narrowed(
        self, rows: LiveTokens, query: Tensor, keys: int, mask: Tensor | None, window: Window
    ) -> Tensor:
        P = rows.size
        if mask is None:
            causal = torch.ones(1, P, keys, dtype=torch.bool, device=query.device).tril()
            kind = masks.check_implementation(self.state.plan.implementation)
            mask = masks.as_kind(causal, kind, query.dtype)
        near, hidden = self._pairs(rows, query.device, window.size)
        own, later = mask[..., :P], near.triu(1)
        if window.causal:
            hidden = hidden | later
        else:
            # a token sees another behind it where that one sees it: padding, documents, a sliding
            # window of the model's and what a caller's mask hides stay hidden
            own = torch.where(later, own.mT, own)
        least = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        own = own.masked_fill(hidden, least)
        return torch.cat([own, mask[..., P:].expand(*own.shape[:-1], -1)], dim=-1)

    def _pairs(self, rows: LiveTokens, device: torch.device, size: int) -> tuple[Tensor, Tensor]:
        """`[B, 1, P, P]` bool: pairs of visual tokens within a window, and all other such pairs."""
        cells = sent(self.cells, device).gather(1, rows.index[..., None].expand(-1, -1, 3))
        picture, row, column = cells.unbind(-1)
        if (valid := self.state.valid_rows(rows)) is not None:  # padding sees, and is not seen
            picture = picture.masked_fill(~valid.to(device), NOWHERE)
        placed = picture != NOWHERE
        visual = placed[:, :, None] & placed[:, None]
        near = visual & (picture[:, :, None] == picture[:, None])
        for place in (row, column):
            near &= (place[:, :, None] - place[:, None]).abs() <= size // 2
        return near[:, None], (visual & ~near)[:, None]
