"""Cut a cache layer to what stays of it, head by head."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from vispress.errors import UnsupportedModelError
from vispress.methods.cache_evictor import CachePlan
from vispress.runtime.hooks.head_shards import HeadShards
from vispress.runtime.kv_cache.dynamic import CompressedDynamicLayer
from vispress.runtime.kv_cache.slots import CompressedLayerMixin, Slots
from vispress_kernels.merge_tokens import merge_tokens


class Placed(NamedTuple):
    """Visual tokens of some images in a layer's cache, and what is to stay of them.

    Args:
        samples: Batch row of each image, on the host.
        slots: `[Bk, N]` int64.
        plan: What stays.
    """

    samples: Sequence[int]
    slots: Tensor
    plan: CachePlan


def tokens_at(
    x: Tensor, samples: Sequence[int], slots: Tensor, shards: HeadShards | None = None
) -> Tensor:
    """`[Bk, Hkv, N, D]`: some slots of `[B, Hkv, S, D]` keys or values, of all processes' heads."""
    rows = x if list(samples) == list(range(len(x))) else x[torch.tensor(samples, device=x.device)]
    index = slots.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    found = rows.gather(2, index)
    return found if shards is None else shards.gather(found, 1)


def part_of(plan: CachePlan, shards: HeadShards | None) -> CachePlan:
    """Take of a plan for all KV heads what is about those of this process."""
    if shards is None:
        return plan

    def part(x: Tensor) -> Tensor:
        return x if x.shape[1] == 1 else shards.own(x, 1)

    assign, weight = (None if x is None else part(x) for x in (plan.assign, plan.weight))
    return replace(plan, keep=part(plan.keep), assign=assign, weight=weight)


def gone_slots(placed: Sequence[Placed], batch: int, size: int) -> Tensor:
    """`[B, Hkv or 1, S]` bool: slots that do not stay."""
    heads = max(each.plan.keep.shape[1] for each in placed)
    device = placed[0].plan.keep.device
    gone = torch.zeros(batch, heads, size, dtype=torch.bool, device=device)
    for samples, slots, plan in placed:
        shape = (*plan.keep.shape[:2], slots.shape[1])
        lost = torch.ones(shape, dtype=torch.bool, device=device).scatter(2, plan.keep, False)
        index = slots[:, None].expand(-1, heads, -1)
        for row, sample in enumerate(samples):  # a batch row may hold several images
            gone[sample].scatter_(1, index[row], lost[row].expand(heads, -1))
    return gone


def merge_slots(layer: CompressedLayerMixin, placed: Placed) -> None:
    """Fold keys and values of tokens that go into those that stay, as a plan says."""
    samples, slots, plan = placed
    assert plan.assign is not None
    assert plan.weight is not None
    assert layer.keys is not None
    heads = layer.keys.shape[1]
    keep, assign, weight = (
        x.expand(-1, heads, -1).flatten(0, 1) for x in (plan.keep, plan.assign, plan.weight)
    )
    places = slots[:, None].expand(-1, heads, -1).flatten(0, 1).gather(1, keep)
    places = places.view(len(samples), heads, -1, 1)
    for name in ("keys", "values"):
        whole: Tensor = getattr(layer, name).clone()  # the layer's attention still reads the old
        tokens = tokens_at(whole, samples, slots).flatten(0, 1)
        merged = merge_tokens(tokens, assign, keep.shape[1], weight=weight).to(whole.dtype)
        merged = merged.view(len(samples), heads, keep.shape[1], -1)
        for row, sample in enumerate(samples):
            index = places[row].expand(-1, -1, whole.shape[-1])
            whole[sample].scatter_(1, index, merged[row])
        setattr(layer, name, whole)


def evict_slots(layer: CompressedLayerMixin, gone: Tensor, drops: Sequence[int]) -> None:
    """Let slots go for good; the others keep their order and end up at the right.

    Heads may keep different tokens, but as many. Positions of the slots are then those of the first
    head: they tell text from what came before it, which is all that later calls ask of them.

    Args:
        layer: A growing layer, with the chunk stored.
        gone: `[B, Hkv or 1, S]` bool, valid slots.
        drops: How many that is of each row, in each head.
    """
    cut_layer(layer, *staying_slots(layer.slots, gone, drops))


def staying_slots(slots: Slots, gone: Tensor, drops: Sequence[int]) -> tuple[Tensor, Slots]:
    """Find where the slots that stay are, `[B, Hkv or 1, S']`, and what they hold.

    Args:
        slots: Of a layer, or of several that hold the same.
        gone: As in `evict_slots`.
        drops: As in `evict_slots`.
    """
    S, valid = slots.size, slots.valid
    stays = ~gone if valid is None else ~gone & valid[:, None].to(gone.device)
    counts = [S - drop for drop in drops]
    if valid is not None:
        counts = [n - drop for n, drop in zip(valid.sum(1).tolist(), drops, strict=True)]
    size = max(counts)
    local = stays.view(torch.uint8).argsort(dim=2, stable=True)[:, :, S - size :]
    new_valid = None
    if min(counts) < size:
        pad = torch.tensor([size - count for count in counts], device=gone.device)
        new_valid = torch.arange(size, device=gone.device) >= pad.unsqueeze(1)
    positions = slots.positions.to(local.device).gather(1, local[:, 0])
    return local, Slots(positions, new_valid, slots.shift, slots.logical, slots.padded)


def cut_layer(layer: CompressedLayerMixin, local: Tensor, slots: Slots) -> None:
    """Leave in a layer what `staying_slots` found."""
    assert layer.keys is not None
    assert layer.values is not None
    index = local.to(layer.keys.device)[..., None].expand(-1, layer.keys.shape[1], -1, -1)
    layer.keys = layer.keys.gather(2, index.expand(-1, -1, -1, layer.keys.shape[-1]))
    layer.values = layer.values.gather(2, index.expand(-1, -1, -1, layer.values.shape[-1]))
    layer.slots = slots


def pack(cache: Cache) -> None:
    """Let slots go that hold nothing and that no row of the batch needs: chunks leave some.

    Growing layers alone: a sliding one lets go of its own.
    """
    found: dict[int, tuple[Slots, tuple[Tensor, Slots]]] = {}
    for layer in cache.layers:
        if type(layer) is not CompressedDynamicLayer or layer.slots.valid is None:
            continue
        slots = layer.slots
        if id(slots) not in found:  # layers that hold the same share one object
            none = torch.zeros_like(layer.slots.positions, dtype=torch.bool)[:, None]
            found[id(slots)] = slots, staying_slots(slots, none, (0,) * len(none))
        local, packed = found[id(slots)][1]
        if packed.size < slots.size:
            cut_layer(layer, local, packed)


def refuse_fixed(name: str, cache: Cache | None) -> None:
    """Refuse, in the name of a method, a cache whose layers hold a fixed number of tokens.

    Raises:
        UnsupportedModelError: It is a static or a sliding cache.
    """
    kinds = [] if cache is None else [type(layer) for layer in cache.layers]
    kinds.append(getattr(cache, "layer_class_to_replicate", None) or object)
    for kind in kinds:
        if issubclass(kind, StaticLayer) or "Sliding" in kind.__name__:
            raise UnsupportedModelError(
                f"{name} evicts from the KV cache, and layers of kind {kind.__name__} hold a fixed "
                "number of tokens; use DynamicCache()"
            )


def without_slots(
    placed: Sequence[Placed], answers: Tensor, query: Tensor, key: Tensor, mask: Tensor | None
) -> Tensor | None:
    """The mask without evicted keys for the rows of answers."""
    (B, H, P, _), S = query.shape, key.shape[2]
    if not placed:
        return mask
    if mask is None:
        mask = torch.ones(1, 1, P, S, dtype=torch.bool, device=query.device).tril(S - P)
    gone = gone_slots(placed, B, S)
    gone = gone.repeat_interleave(H // gone.shape[1], dim=1) if gone.shape[1] > 1 else gone
    blocked = answers[:, None, :, None] & gone[:, :, None]
    if mask.dtype == torch.bool:
        return mask & ~blocked
    return mask.masked_fill(blocked, torch.finfo(mask.dtype).min)
