"""The oracle of inactive heads: a layer's eager attention written out, on the plain model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tests.laws.oracle import language_model
from torch import Tensor

Inactive = Mapping[int, Sequence[int]]


@contextmanager
def without_heads(model: Any, visual: Tensor, prompt: Tensor, inactive: Inactive) -> Iterator[None]:
    """Inside, attention of some layers is ours: heads that are inactive leave out visual tokens.

    Args:
        model: Not compressed, without a cache, its masks set by other hooks.
        visual: `[B, L]` bool.
        prompt: `[B, L]` bool: rows from whose inactive heads visual tokens are left out.
        inactive: By layer.
    """
    layers = language_model(model).layers
    for number, heads in inactive.items():
        layers[number].self_attn.__dict__["forward"] = _attention(
            layers[number].self_attn, visual, prompt, heads
        )
    try:
        yield
    finally:
        for number in inactive:
            del layers[number].self_attn.__dict__["forward"]


def _attention(module: Any, visual: Tensor, prompt: Tensor, heads: Sequence[int]) -> Any:
    off = torch.zeros(module.config.num_attention_heads, dtype=torch.bool)
    off[list(heads)] = True

    def forward(hidden_states: Tensor, **given: Any) -> tuple[Tensor, None]:
        B, L, _ = hidden_states.shape
        size = module.head_dim
        marks = _longer(visual, L, fill=False)
        rows = _longer(prompt, L, fill=False)
        q, k, v = (
            project(hidden_states).view(B, L, -1, size).transpose(1, 2)
            for project in (module.q_proj, module.k_proj, module.v_proj)
        )
        cos, sin = (
            table if table.ndim == 3 else table[0] for table in given["position_embeddings"]
        )
        q, k = (x * cos[:, None] + _rotated(x) * sin[:, None] for x in (q, k))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        logits = q @ k.transpose(2, 3) / size**0.5
        mask = given["attention_mask"]
        mask = mask if mask.dtype == torch.bool else mask == 0
        weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
        zero = off[:, None, None] & rows[:, None, :, None] & marks[:, None, None]
        out = (weights * ~zero) @ v
        out = out * ~(off[:, None, None] & marks[:, None, :, None])
        return module.o_proj(out.transpose(1, 2).reshape(B, L, -1)), None

    return forward


def _rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], -1)


def _longer(marks: Tensor, length: int, *, fill: bool) -> Tensor:
    more = marks.new_full((len(marks), length - marks.shape[1]), fill)
    return torch.cat([marks, more], 1)
