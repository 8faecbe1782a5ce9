"""What is remembered of a prefill; turned into a report only when one is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vispress.runtime.kv_cache.slots import CompressedLayerMixin
from vispress.runtime.tokens.images import Image

if TYPE_CHECKING:
    from vispress.runtime.attachment import Attachment
    from vispress.runtime.forward.state import ForwardState
    from vispress.runtime.stages.select import BoundPlacement
    from vispress.runtime.tokens.pair_masks import PairMasks


@dataclass(eq=False)
class PrefillRecord:
    """The facts of one prefill; tensors stay on their device.

    Args:
        steps: Placements, in the order they acted.
        notes: Remarks made when the model was compressed.
        images: With their traces.
        layer_alive: `[B, past + Q]` bool a decoder layer; layers with the same rows share one
            tensor.
        kv_bytes: Keys and values in the cache after the prefill.
        width: LLM hidden size.
        mlp_width: LLM MLP size.
        past: Logical length before the prefill.
        encoder: Name of the method that merges in the vision encoder, if one does.
        pairs: Masks of pairs, if a method makes them.
    """

    steps: Sequence["BoundPlacement"]
    notes: Sequence[str]
    images: Sequence[Image]
    layer_alive: Sequence[Tensor]
    kv_bytes: int
    width: int
    mlp_width: int
    past: int
    encoder: str | None = None
    pairs: "PairMasks | None" = None

    @classmethod
    def of(cls, attachment: "Attachment", state: "ForwardState", kv_bytes: int) -> "PrefillRecord":
        """The record of a finished call."""
        config: Any = attachment.adapter.language_model.config
        seen: dict[int, tuple[object, Tensor]] = {}
        layers = [
            _alive(state, layer, seen) for layer in range(len(attachment.adapter.decoder_layers))
        ]
        return cls(
            attachment.steps,
            attachment.notes,
            state.images,
            layers,
            kv_bytes,
            config.hidden_size,
            config.intermediate_size,
            state.past,
            None if attachment.encoder_step is None else attachment.encoder_step.method.name,
            state.pairs,
        )


def _alive(state: "ForwardState", layer: int, seen: dict[int, tuple[object, Tensor]]) -> Tensor:
    rows = state.rows_at(layer)
    held = None
    if state.cache is not None and layer < len(state.cache.layers):
        held = state.cache.layers[layer]
    slots = held.slots if isinstance(held, CompressedLayerMixin) and held.slots.logical else None
    same = rows if slots is None else slots  # held in `seen`, so that its id stays its own
    if id(same) in seen:
        return seen[id(same)][1]
    batch, full = rows.index.shape[0], state.past + rows.length
    if slots is not None:
        alive = torch.zeros(batch, full + 1, dtype=torch.bool, device=slots.positions.device)
        target = slots.positions
        target = target if slots.valid is None else target.masked_fill(~slots.valid, full)
        alive = alive.scatter(1, target, True)[:, :-1]
    else:
        chunk = state.row_validity(rows) if rows.whole else rows.alive
        before = torch.ones(batch, state.past, dtype=torch.bool, device=chunk.device)
        if state.mask_2d is not None:
            before = state.mask_2d[:, : state.past].to(chunk.device)
        alive = torch.cat([before, chunk], dim=1)
    seen[id(same)] = (same, alive)
    return alive
