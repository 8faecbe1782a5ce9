"""The oracle of masked pairs: an untouched model whose attention masks them, in plain Python.

For `oracle_forward` and `oracle_generate`, which run the whole sequence: every row is worked out
from the attention of that layer without a mask of pairs, one sample and one row after the other.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from tests.laws.oracle import extend, language_model
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "oracle_pairs"


def focused(attention: Tensor, real: Tensor, visual: Tensor, mass: float) -> Tensor:
    """`[L, L]` bool, which pairs one sample masks: `attention [L, L]` before, `real`, `visual`."""
    gone = torch.zeros_like(attention, dtype=torch.bool)
    text = [t for t in range(len(real)) if real[t] and not visual[t]]
    images = [i for i in range(len(real)) if real[i] and visual[i]]
    for t in text:
        focus = sum((attention[t, s] * attention[s, images] for s in text if s <= t), start=0)
        total, got = float(sum(focus)), 0.0
        for n in sorted(range(len(images)), key=lambda n: (-float(focus[n]), n)):
            gone[t, images[n]] = got >= mass * total and total > 0
            got += float(focus[n])
    return gone


@contextmanager
def pair_masked(
    model: Any,
    alive: Sequence[Tensor],
    visual: Tensor,
    first: int,
    mass: float = 0.9,
    seen: list[Tensor] | None = None,
) -> Iterator[None]:
    """Inside, layers from `first` on mask the pairs outside of each text row's focus.

    Args:
        model: Not compressed, with SDPA.
        alive: `[B, L]` a decoder layer, as the oracle has it; later positions are alive.
        visual: `[B, L]` bool, places of visual tokens.
        first: The first layer that masks.
        mass: Share of the focus that stays.
        seen: Gets the pairs of each layer.
    """
    modules = [layer.self_attn for layer in language_model(model).layers]
    configs = [module.config for module in modules]

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **rest: Any
    ) -> Any:
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        logits = (q @ keys.transpose(2, 3) * scaling).masked_fill(~mask, float("-inf"))
        attention = logits.softmax(-1).mean(1).detach()
        more = attention.shape[1] - visual.shape[1]
        real = extend(alive[module.layer_idx], more, fill=True)
        images = extend(visual, more, fill=False)
        gone = torch.stack(
            [focused(*one, mass) for one in zip(attention, real, images, strict=True)]
        )
        if seen is not None:
            seen.append(gone)
        return sdpa_attention_forward(
            module, q, k, v, mask & ~gone[:, None], scaling=scaling, **rest
        )

    AttentionInterface.register(NAME, attend)
    for module in modules[first:]:
        module.config = copy(module.config)
        module.config._attn_implementation = NAME
    try:
        yield
    finally:
        for module, config in zip(modules, configs, strict=True):
            module.config = config
        AttentionInterface._global_mapping.pop(NAME)
