"""Masks of pairs in a decode step of one token: as `LayerPairs` gives them, for fewer calls.

A step's row sees all that the cache holds, so what does not follow from q and k (places, masks) is
made once for all layers that hold the same, and each layer is left with what the definition takes:
its row of attention, the focus, and the mask.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vispress.methods.pair_masker import PairMasker
from vispress.runtime.hooks.attention import Softmax, attention_rows
from vispress.runtime.hooks.head_shards import HeadShards
from vispress.runtime.kv_cache.pair_memory import PairMemory, PairSlots


class StepPairs:
    """The pairs of one step, layer by layer; called without gradients.

    Args:
        masker: What decides.
        layers: Layers of the cache; those whose attention is shown remember pairs.
        shards: Gives the processes that have the other heads, from how many there are here.
    """

    def __init__(
        self,
        masker: PairMasker,
        layers: Sequence[Any],
        shards: Callable[[int], HeadShards | None],
    ) -> None:
        self._masker, self._layers, self._shards_of = masker, layers, shards
        self._shared: _SharedStep | None = None
        self._softmax, self._plain = Softmax(0.0), True
        self._heads = 0
        self._shards: HeadShards | None = None

    def attend(
        self,
        number: int,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """Give the mask without the pairs that the method leaves out.

        Args:
            number: The decoder layer.
            query: `[B, H, 1, D]`, post-RoPE.
            key: `[B, Hkv, S, D]`, the past included.
            mask: `[B or 1, H or 1, 1, >= S]` bool or additive; None for all keys.
            kwargs: Keyword arguments of the attention.
        """
        old: PairMemory = self._layers[number].pairs
        shared, softmax = self._shared, self._softmax
        if shared is None or shared.before is not old.slots or shared.given is not mask:
            shared = self._shared = _SharedStep(old.slots, mask, key.shape[2])
        if softmax.scaling != kwargs["scaling"] or "softcap" in kwargs or "s_aux" in kwargs:
            softmax = self._softmax = Softmax.of(kwargs)
            self._plain = softmax.plain
        if query.shape[1] != self._heads:
            self._heads, self._shards = query.shape[1], self._shards_of(query.shape[1])
        dtype, (batch, _, _, width) = query.dtype, query.shape
        if shared.sees_all and self._plain and dtype == key.dtype and dtype.itemsize >= 4:
            # as `attention_rows`, and no row is without a key
            logits = query.reshape(batch, key.shape[1], -1, width) @ key.mT
            logits *= softmax.scaling
            rows = logits.softmax(dim=-1).mean(dim=(1, 2))[:, None]
        else:
            rows = attention_rows(query, key, shared.allowed, softmax, blocked=shared.blocked)
            rows = rows.mean(dim=1)
        if self._shards is not None:
            rows = self._shards.mean(rows)
        found = rows.gather(2, shared.columns)
        if shared.valid is not None:
            found = found * shared.valid
        # memory of all rows, the step's among them
        image = torch.cat([old.attention, found[..., shared.texts :]], dim=1)
        keep = self._masker.keep_pairs(found[..., : shared.texts], image)
        old.slots, old.attention = shared.slots, image
        if shared.sees_all and shared.padding is None:  # no calls: all layers come here
            return shared.whole.scatter(3, shared.place, keep[:, None])
        return shared.mask(keep)


class _SharedStep:
    """What does not depend on q and k, in all layers of one past and mask.

    Args:
        before: What the layers held.
        mask: As the attention is called with.
        size: S, keys of the attention.
    """

    def __init__(self, before: PairSlots, mask: Tensor | None, size: int) -> None:
        self.before, self.given, self.sees_all = before, mask, mask is None
        batch, device = len(before.text), before.text.device
        none = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.slots = slots = PairSlots(none, None, none[:, :0], None).behind(before, size - 1)
        self.texts = slots.text.shape[1]
        self.columns = torch.cat([slots.text, slots.image], dim=1)[:, None]  # [B, 1, T + N]
        self.valid = _valid(slots)  # [B, 1, T + N], or None
        self.allowed: Tensor | None = None
        self.blocked: Tensor | None = None
        if mask is None:
            mask = torch.ones(1, 1, 1, size, dtype=torch.bool, device=device)
        mask = mask[..., :size]
        if not self.sees_all and mask.dtype == torch.bool:
            self.blocked = ~mask
        elif not self.sees_all:
            self.allowed = mask
        self.whole = mask.expand(batch, -1, -1, -1)  # [B, H or 1, 1, S]
        columns, self.padding = slots.image[:, None], None
        if slots.image_valid is not None:  # its place is the row's own, which it may always see
            columns = columns.where(slots.image_valid[:, None], size - 1)
            self.padding = ~slots.image_valid[:, None]
        self.place = columns[:, None].expand(-1, mask.shape[1], -1, -1)  # [B, H or 1, 1, N]
        self._pairs = self.whole.gather(3, self.place)

    def mask(self, keep: Tensor) -> Tensor:
        """`[B, H or 1, 1, S]`: the mask with the pairs `[B, 1, N]` alone."""
        keep = (keep if self.padding is None else keep | self.padding)[:, None]
        if self._pairs.dtype == torch.bool:
            pairs = self._pairs & keep
        else:
            pairs = self._pairs.masked_fill(~keep, torch.finfo(self._pairs.dtype).min)
        return self.whole.scatter(3, self.place, pairs)


def _valid(slots: PairSlots) -> Tensor | None:
    """`[B, 1, T + N]`, slots of text and of images that are no padding; None for all."""
    if slots.text_valid is None and slots.image_valid is None:
        return None
    marks = [
        torch.ones_like(places, dtype=torch.bool) if real is None else real
        for places, real in ((slots.text, slots.text_valid), (slots.image, slots.image_valid))
    ]
    return torch.cat(marks, dim=1)[:, None]
