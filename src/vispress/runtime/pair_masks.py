"""Masks of (text row, visual token) pairs, decided in each layer by that layer's own attention.

A decoder layer hands `LayerPairs` to its attention, which works out the attention rows of text from
q and k, asks the method which pairs stay, and attends with the others masked. The layer's cache
remembers how its text rows attended to visual tokens (`PairMemory`), so that a token fed later is
masked as it is in the whole sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from vispress.runtime.attention import attention_rows
from vispress.runtime.pair_step import PairStep
from vispress.runtime.rows import Rows
from vispress.runtime.slots import Compressed, PairMemory

if TYPE_CHECKING:
    from vispress.runtime.state import ForwardState

_BLOCK = 128  # text rows whose heads are held at once


@dataclass(frozen=True, eq=False)
class _Places:
    """Rows of text and of visual tokens in a layer's chunk: `[B, R]` and `[B, N]`, and padding."""

    rows: Rows
    text: Tensor
    text_valid: Tensor
    image: Tensor
    image_valid: Tensor


class PairMasks:
    """The pairs of one call.

    Args:
        step: The placement.
        visual: `[B, Q]` bool, places of the call's visual tokens; None when it brings none.
        keeps: Whether decisions are kept for a checkpointed layer that runs again.
    """

    def __init__(self, step: PairStep, visual: Tensor | None, *, keeps: bool) -> None:
        self.step, self.visual, self.keeps = step, visual, keeps
        self.counts: list[Tensor] = []  # [2] a layer: pairs masked, and all that are causal
        self._places: dict[int, _Places] = {}
        self._decided: dict[int, Tensor] = {}

    @classmethod
    def of(cls, step: PairStep | None, state: "ForwardState") -> "PairMasks | None":
        """None where there is nothing to mask.

        Raises:
            UnsupportedModelError: The attention implementation or the cache cannot do it.
        """
        if step is None:
            return None
        layers = [] if state.cache is None else state.cache.layers
        held = layers[step.first] if len(layers) > step.first else None
        remembers = isinstance(held, Compressed) and held.pairs is not None
        if not state.images and not remembers:
            return None
        language_model = state.attachment.adapter.language_model
        step.check_implementation(language_model.config._attn_implementation)
        step.check_cache(state.cache)
        visual = None
        if state.images:
            index = state.rows[0][1].index
            visual = torch.zeros(index.shape, dtype=torch.bool, device=index.device)
            for image in state.images:
                visual[image.sample, image.positions.to(index.device)] = True
        keeps = state.cache is None and language_model.training
        return cls(step, visual, keeps=keeps)

    def at(self, state: "ForwardState", number: int, device: torch.device) -> "LayerPairs":
        """What the attention of a layer is handed."""
        rows = state.rows_at(number).to(device)
        if id(rows) not in self._places:
            self._places[id(rows)] = self._find(rows, state.row_validity(rows))
        held = None if state.cache is None else state.cache.layers[number]
        return LayerPairs(self, number, self._places[id(rows)], held)

    def _find(self, rows: Rows, real: Tensor) -> _Places:
        if self.visual is None:
            every = torch.arange(rows.size, device=real.device).expand(real.shape)
            return _Places(rows, every, real, every[:, :0], real[:, :0])
        seen = self.visual.to(real.device).gather(1, rows.index)
        return _Places(rows, *_packed(real & ~seen), *_packed(real & seen))

    def decide(self, number: int, decide: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        """`[B, P, S]` bool, the pairs that a layer masks; one that runs again masks the same."""
        if number in self._decided:
            return self._decided[number]
        drop, counts = decide()
        self.counts.append(counts)
        if self.keeps:
            self._decided[number] = drop
        return drop


class LayerPairs:
    """The pairs of one layer in one call; what its attention is handed.

    Args:
        pairs: The call's.
        number: The decoder layer.
        places: Its rows.
        held: Its cache layer, or None.
    """

    def __init__(self, pairs: PairMasks, number: int, places: _Places, held: object) -> None:
        self.pairs, self.number, self.places = pairs, number, places
        self.held = held if isinstance(held, Compressed) else None

    def narrow(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """The mask without the pairs that the method leaves out.

        Args:
            query: `[B, H, P, D]`, post-RoPE.
            key: `[B, Hkv, S, D]`, the past included.
            mask: `[B or 1, H or 1, P, >= S]` bool or additive; None for all keys up to the row.
            scaling: Factor on the logits.
        """
        P, S = query.shape[2], key.shape[2]
        if mask is None:
            mask = torch.ones(P, S, dtype=torch.bool, device=key.device).tril(S - P)[None, None]
        mask = mask[..., :S]
        whole = mask.expand(query.shape[0], -1, -1, -1)
        with torch.no_grad():
            drop = self.pairs.decide(
                self.number, lambda: self._decide(query.detach(), key.detach(), whole, scaling)
            )
        if mask.dtype == torch.bool:
            return mask & ~drop[:, None]
        return whole.masked_fill(drop[:, None], torch.finfo(mask.dtype).min)

    def _decide(
        self, query: Tensor, key: Tensor, mask: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        B, P, S = query.shape[0], query.shape[2], key.shape[2]
        here, offset = self.places, S - P
        old = None if self.held is None else self.held.pairs
        if old is None:
            old = PairMemory.empty(B, here.text, query)
        known = replace(
            old,
            text=torch.cat([old.text, here.text + offset], dim=1),
            text_valid=torch.cat([old.text_valid, here.text_valid], dim=1),
            image=torch.cat([old.image, here.image + offset], dim=1),
            image_valid=torch.cat([old.image_valid, here.image_valid], dim=1),
        )
        text, image = self._rows(known, query, key, mask, scaling)
        earlier = F.pad(old.attention, (0, here.image.shape[1]))  # what came later was not seen
        known = replace(known, attention=torch.cat([earlier, image], dim=1))
        keep = self.pairs.step.masker.keep_pairs(text, known.attention)
        if self.held is not None:
            self.held.pairs = known
        row = (here.text + offset)[:, :, None]
        seen = here.text_valid[:, :, None] & known.image_valid[:, None]
        seen = seen & (known.image[:, None] <= row)
        gone = seen & ~keep
        return self._spread(gone, known, P, S), torch.stack([gone.sum(), seen.sum()])

    def _rows(
        self, known: PairMemory, query: Tensor, key: Tensor, mask: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """`[B, R, T]` and `[B, R, N]`: attention of the chunk's text to text and to images."""
        B, H, _, D = query.shape
        # the first is there so that a chunk without text has something to join
        text = [known.attention.new_zeros(B, 0, known.text.shape[1])]
        image = [known.attention.new_zeros(B, 0, known.image.shape[1])]
        for start in range(0, self.places.text.shape[1], _BLOCK):
            block = slice(start, start + _BLOCK)
            index, valid = self.places.text[:, block], self.places.text_valid[:, block]
            at = index[:, None, :, None]
            asked = query.gather(2, at.expand(-1, H, -1, D))
            allowed = mask.gather(2, at.expand(-1, mask.shape[1], -1, mask.shape[3]))
            rows = attention_rows(asked, key, allowed, scaling).mean(dim=1) * valid[:, :, None]
            text.append(_columns(rows, known.text, known.text_valid))
            image.append(_columns(rows, known.image, known.image_valid))
        return torch.cat(text, dim=1), torch.cat(image, dim=1)

    def _spread(self, gone: Tensor, known: PairMemory, rows: int, slots: int) -> Tensor:
        """`[B, P, S]` from pairs `[B, R, N]`; padding goes to a spare row or column."""
        B, R, _ = gone.shape
        column = known.image.masked_fill(~known.image_valid, slots)
        wide = gone.new_zeros(B, R, slots + 1)
        wide = wide.scatter(2, column[:, None].expand(-1, R, -1), gone)[..., :slots]
        row = self.places.text.masked_fill(~self.places.text_valid, rows)
        whole = gone.new_zeros(B, rows + 1, slots)
        return whole.scatter(1, row[:, :, None].expand(-1, -1, slots), wide)[:, :rows]


def _columns(rows: Tensor, slots: Tensor, valid: Tensor) -> Tensor:
    """`[B, R, M]`: what rows `[B, R, S]` hold in some slots, 0 on padding."""
    return rows.gather(2, slots[:, None].expand(-1, rows.shape[1], -1)) * valid[:, None]


def _packed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, M]` places of the True ones of each row, ascending, and which are no padding."""
    counts = mask.sum(dim=1, keepdim=True)
    most = int(counts.max())
    order = mask.long().argsort(dim=1, descending=True, stable=True)[:, :most]
    return order, torch.arange(most, device=mask.device) < counts
