"""Masks of (text row, visual token) pairs, decided in each layer by that layer's own attention.

A decoder layer hands `LayerPairs` to its attention, which works out the attention rows of text from
q and k, asks the method which pairs stay, and attends with the others masked. The layer's cache
remembers how its text rows attended to visual tokens (`PairMemory`), so that a token fed later is
masked as it is in the whole sequence.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from vispress.devices import sent
from vispress.methods.pair_masker import PairMasker
from vispress.runtime.hooks.attention import Softmax, attention_rows
from vispress.runtime.hooks.head_shards import HeadShards
from vispress.runtime.kv_cache.pair_memory import PairMemory, PairSlots
from vispress.runtime.kv_cache.slots import CompressedLayerMixin
from vispress.runtime.tokens.live_tokens import LiveTokens
from vispress.runtime.tokens.masks import BLOCKED

_BLOCK = 128  # text rows whose heads are held at once


class PairMasks:
    """The pairs of one call.

    Args:
        masker: What decides.
        visual: `[B, Q]` bool, places of the call's visual tokens; None when it brings none.
        texts: Text rows of each sample, without padding.
        last: The last decoder layer.
        keeps: Whether decisions are kept for a checkpointed layer that runs again.
    """

    def __init__(
        self,
        masker: PairMasker,
        visual: Tensor | None,
        texts: Sequence[int],
        last: int,
        *,
        keeps: bool,
    ) -> None:
        self.masker, self.visual, self.texts = masker, visual, texts
        self.last, self.keeps = last, keeps
        self._counts: list[tuple[Tensor, Tensor]] = []
        self._places: dict[int, tuple[LiveTokens, PairSlots]] = {}
        self._shared: _Shared | None = None
        self._decided: dict[int, Tensor] = {}

    def places(self, rows: LiveTokens, real: Tensor | None) -> PairSlots:
        """Where text and visual tokens stand among rows; the same object for the same rows.

        Args:
            rows: Live tokens of a layer.
            real: `[B, P]` bool, False on padding; None for no padding.
        """
        if id(rows) not in self._places:  # rows are held beside: their id stays theirs
            self._places[id(rows)] = rows, self._find(rows, real)
        return self._places[id(rows)][1]

    def _find(self, rows: LiveTokens, real: Tensor | None) -> PairSlots:
        """Where text and visual tokens stand among rows, of which some may be padding."""
        if self.visual is None:
            return PairSlots(rows.index, real, rows.index[:, :0], None)
        seen = self.visual.to(rows.index.device)
        seen = seen if rows.whole else seen.gather(1, rows.index)
        text, image = (~seen, seen) if real is None else (real & ~seen, real & seen)
        images = [every - own for every, own in zip(rows.counts, self.texts, strict=True)]
        return PairSlots(*_packed(text, self.texts), *_packed(image, images))

    def shared(
        self, here: PairSlots, before: PairSlots | None, mask: Tensor | None, shape: tuple[int, int]
    ) -> "_Shared":
        """As `_Shared` takes them; the layer's before where that had the same."""
        last = self._shared
        same = last is not None and last.here is here and last.before is before
        if last is None or not same or last.given is not mask or last.shape != shape:
            last = self._shared = _Shared(here, before, mask, shape)
        return last

    def forget(self) -> None:
        """Let go of what the layers share: counts are kept for a report."""
        self._shared = None

    def decide(self, number: int, decide: Callable[[], Tensor], seen: Tensor) -> Tensor:
        """`[B, R, N]` bool, the pairs that a layer masks; one that runs again masks the same."""
        if number in self._decided:
            return self._decided[number]
        gone = decide()
        self._counts.append((gone.sum(), seen))
        if self.keeps:
            self._decided[number] = gone
        return gone

    @property
    def counts(self) -> list[Tensor]:
        """`[2]` a layer: pairs masked, and all that are causal."""
        return [torch.stack(pair) for pair in self._counts]


class _Shared:
    """What does not depend on q and k: the same in all layers with the same rows, mask and past.

    Args:
        here: Places in the chunk.
        before: What the cache layer held, or None.
        mask: As the attention was called with.
        shape: P and S, rows and keys of the attention.
    """

    def __init__(
        self, here: PairSlots, before: PairSlots | None, mask: Tensor | None, shape: tuple[int, int]
    ) -> None:
        self.here, self.before, self.given, self.shape = here, before, mask, shape
        (P, S), (B, R) = shape, here.text.shape
        self.slots = slots = here.behind(before, S - P)
        if mask is None:
            mask = torch.ones(1, 1, P, S, dtype=torch.bool, device=here.text.device).tril(S - P)
        mask = mask[..., :S].expand(B, -1, -1, -1)
        boolean, heads = mask.dtype == torch.bool, mask.shape[1]
        allowed = mask.gather(2, here.text[:, None, :, None].expand(-1, heads, -1, S))
        self.allowed = None if boolean else allowed  # [B, H or 1, R, S]
        self.blocked = ~allowed if boolean else None  # the same
        own, columns = slots.text[:, slots.text.shape[1] - R :, None], slots.image[:, None]
        self.seen = columns <= own
        if here.text_valid is not None:
            self.seen &= here.text_valid[:, :, None]
        if slots.image_valid is not None:
            self.seen &= slots.image_valid[:, None]
            # instead of padding, which may name the slot of an image token: no pair stands there
            columns = torch.where(slots.image_valid[:, None], columns, own)
        self._mask = mask.flatten(2)  # [B, H or 1, P * S]
        place = (here.text[:, :, None] * S + columns).view(B, 1, -1)
        self._place = place.expand(-1, heads, -1)  # [B, H or 1, R * N]
        self._pairs = self._mask.gather(2, self._place)
        self._least = False if boolean else torch.finfo(mask.dtype).min
        # the mask may keep more apart than order does: documents of packed rows
        seen = self._pairs if boolean else self._pairs > BLOCKED
        self.seen &= seen.any(dim=1).view_as(self.seen)
        self.count = self.seen.sum()

    def without(self, gone: Tensor) -> Tensor:
        """`[B, H or 1, P, S]`: the mask without the pairs `[B, R, N]`."""
        gone = gone.view(len(gone), 1, -1)
        pairs = self._pairs.masked_fill(gone, self._least)
        return self._mask.scatter(2, self._place, pairs).view(*pairs.shape[:2], *self.shape)


class LayerPairs:
    """The pairs of one layer in one call; what its attention is handed.

    Args:
        pairs: The call's.
        number: The decoder layer.
        here: Places of text and of visual tokens in the chunk.
        held: Its cache layer, or None.
    """

    def __init__(self, pairs: PairMasks, number: int, here: PairSlots, held: object) -> None:
        self.pairs, self.number, self.here = pairs, number, here
        self.held = held if isinstance(held, CompressedLayerMixin) else None

    def narrow(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        softmax: Softmax,
        shards: HeadShards | None = None,
    ) -> Tensor:
        """The mask without the pairs that the method leaves out.

        Args:
            query: `[B, H, P, D]`, post-RoPE.
            key: `[B, Hkv, S, D]`, the past included.
            mask: `[B or 1, H or 1, P, >= S]` bool or additive; None for all keys up to the row.
            softmax: How the layer makes weights of logits.
            shards: Processes that have the other heads, if there are any.
        """
        old = None if self.held is None else self.held.pairs
        before, shape = None if old is None else old.slots, (query.shape[2], key.shape[2])
        shared = self.pairs.shared(self.here, before, mask, shape)
        decide = partial(self._decide, shared, old, query, key, softmax, shards)
        with torch.no_grad():
            gone = self.pairs.decide(self.number, decide, shared.count)
        if self.number == self.pairs.last:
            self.pairs.forget()
        return shared.without(gone)

    def _decide(
        self,
        shared: _Shared,
        old: PairMemory | None,
        query: Tensor,
        key: Tensor,
        softmax: Softmax,
        shards: HeadShards | None,
    ) -> Tensor:
        text, image = self._rows(shared, query, key, softmax, shards)
        if old is not None:
            earlier, more = old.attention, image.shape[2] - old.attention.shape[2]
            earlier = F.pad(earlier, (0, more)) if more else earlier  # it saw none of the new
            image = torch.cat([earlier, image], dim=1)
        keep = self.pairs.masker.keep_pairs(text, image)
        if self.held is not None:
            self.held.pairs = PairMemory(shared.slots, image)
        return shared.seen.masked_fill(keep, False)

    def _rows(
        self,
        shared: _Shared,
        query: Tensor,
        key: Tensor,
        softmax: Softmax,
        shards: HeadShards | None,
    ) -> tuple[Tensor, Tensor]:
        """`[B, R, T]` and `[B, R, N]`: attention of the chunk's text to text and to images."""
        text, image = [], []
        for start in range(0, max(1, self.here.text.shape[1]), _BLOCK):
            block = slice(start, start + _BLOCK)
            at = self.here.text[:, None, block, None].expand(-1, query.shape[1], -1, query.shape[3])
            allowed, blocked = (
                None if mask is None else mask[:, :, block]
                for mask in (shared.allowed, shared.blocked)
            )
            asked = query.gather(2, at)
            rows = attention_rows(asked, key, allowed, softmax, blocked=blocked).mean(dim=1)
            rows = rows if shards is None else shards.mean(rows)
            if self.here.text_valid is not None:
                rows = rows * self.here.text_valid[:, block, None]
            text.append(_columns(rows, shared.slots.text, shared.slots.text_valid))
            image.append(_columns(rows, shared.slots.image, shared.slots.image_valid))
        if len(text) == 1:
            return text[0], image[0]
        return torch.cat(text, dim=1), torch.cat(image, dim=1)


def _columns(rows: Tensor, slots: Tensor, valid: Tensor | None) -> Tensor:
    """`[B, R, M]`: what rows `[B, R, S]` hold in some slots, 0 on padding."""
    found = rows.gather(2, slots[:, None].expand(-1, rows.shape[1], -1))
    return found if valid is None else found * valid[:, None]


def _packed(mask: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """`[B, M]` places of the True ones (so many a row), ascending, and which are no padding."""
    most = max(counts)
    order = mask.long().argsort(dim=1, descending=True, stable=True)[:, :most]
    if min(counts) == most:
        return order, None
    real = sent(torch.tensor(counts), mask.device)
    return order, torch.arange(most, device=mask.device) < real[:, None]
