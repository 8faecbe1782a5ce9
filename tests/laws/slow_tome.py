"""ToMe in a vision encoder, written out sequence by sequence and token by token.

Shares nothing with the runtime: lists of tokens, one loop a layer, attention from the modules'
weights. Layers, norms and MLPs are the model's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tests.tiny import QWEN
from torch import Tensor


@dataclass
class Token:
    """What stands for some tokens: one row a patch, the rotation of each row, and the members."""

    rows: Tensor
    rotary: tuple[Tensor, Tensor] | None
    members: list[int]


@dataclass
class Line:
    """One encoder sequence (crop, frame or window), and the frame it is part of."""

    cls: Tensor | None
    tokens: list[Token]
    frame: int


def run_layer(
    family: str, layer: Any, lines: Sequence[Line], merges: Sequence[int], *, alone: bool
) -> None:
    """One layer over all lines; in so many pairs a line the most similar tokens are merged."""
    keys: dict[int, list[Tensor]] = {}
    for frame in sorted({line.frame for line in lines}):
        for group in (
            [[line] for line in lines if line.frame == frame]
            if alone
            else [[line for line in lines if line.frame == frame]]
        ):
            _attend(family, layer, group, keys)
    for line, count in zip(lines, merges, strict=True):
        _merge(line, keys[id(line)], count)
        for token in line.tokens:
            token.rows = token.rows + _mlp(family, layer, token.rows)
        if line.cls is not None:
            line.cls = line.cls + _mlp(family, layer, line.cls)


def _attend(family: str, layer: Any, group: list[Line], keys: dict[int, list[Tensor]]) -> None:
    """Attention over the lines of a group together; notes the mean key of every token."""
    parts: list[tuple[Line, Token | None]] = []
    for line in group:
        parts += [(line, None)] if line.cls is not None else []
        parts += [(line, token) for token in line.tokens]
    rows = [line.cls if token is None else token.rows for line, token in parts]
    x = torch.cat([row for row in rows if row is not None])
    weight = torch.cat(
        [
            torch.full((len(row),), 1.0 if token is None else len(token.members)).to(x)
            for (_, token), row in zip(parts, rows, strict=True)
            if row is not None
        ]
    )
    q, k, v = _qkv(family, layer, x)
    if parts[0][1] is not None and parts[0][1].rotary is not None:
        cos, sin = (
            torch.cat([token.rotary[i] for _, token in parts if token is not None and token.rotary])
            for i in (0, 1)
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    logits = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5 + weight.log()
    mixed = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v).flatten(1)
    out = _project(family, layer, mixed)
    start = 0
    for (line, token), row in zip(parts, rows, strict=True):
        assert row is not None
        own = slice(start, start + len(row))
        keys.setdefault(id(line), []).append(k[own].mean(dim=(0, 1)))
        if token is None:
            line.cls = row + out[own]
        else:
            token.rows = row + out[own]
        start = own.stop


def _merge(line: Line, keys: list[Tensor], count: int) -> None:
    """Bipartite matching over [CLS] and tokens."""
    items: list[Token | None] = ([] if line.cls is None else [None]) + list(line.tokens)
    even, odd = range(0, len(items), 2), range(1, len(items), 2)
    if not odd:
        return
    unit = [key / key.norm() for key in keys]
    best = {}
    for a in even:
        if items[a] is not None:
            near = max(odd, key=lambda b: float(unit[a] @ unit[b]))
            best[a] = (float(unit[a] @ unit[near]), near)
    ranked = sorted(best, key=lambda a: -best[a][0])
    gone, left = ranked[:count], ranked[count:]
    for b in odd:
        joins = [items[a] for a in gone if best[a][1] == b]
        target = items[b]
        if not joins:
            continue
        group = [target, *joins]
        sizes = [len(token.members) for token in group if token is not None]
        values = [
            n * token.rows for n, token in zip(sizes, group, strict=True) if token is not None
        ]
        assert target is not None
        target.rows = torch.stack(values).sum(0) / sum(sizes)
        target.members = [m for token in group if token is not None for m in token.members]
    stays = sorted(left) if line.cls is not None else left
    line.tokens = [t for t in (items[i] for i in [*stays, *odd]) if t is not None]


def _qkv(family: str, layer: Any, x: Tensor) -> list[Tensor]:
    if family in QWEN:
        attention = layer.attn
        flat = attention.qkv(layer.norm1(x))
        return list(flat.view(len(x), 3, attention.num_heads, -1).unbind(1))
    attention = layer.attention if family == "internvl" else layer.self_attn
    x = layer.layernorm_before(x) if family == "internvl" else layer.layer_norm1(x)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return [p(x).view(len(x), attention.num_heads, -1) for p in projections]


def _project(family: str, layer: Any, x: Tensor) -> Tensor:
    if family in QWEN:
        return layer.attn.proj(x)  # type: ignore[no-any-return]
    if family == "internvl":
        return layer.lambda_1 * layer.attention.projection_layer(x)  # type: ignore[no-any-return]
    return layer.self_attn.out_proj(x)  # type: ignore[no-any-return]


def _mlp(family: str, layer: Any, x: Tensor) -> Tensor:
    if family in QWEN:
        return layer.mlp(layer.norm2(x))  # type: ignore[no-any-return]
    if family == "internvl":
        return layer.lambda_2 * layer.mlp(layer.layernorm_after(x))  # type: ignore[no-any-return]
    return layer.mlp(layer.layer_norm2(x))  # type: ignore[no-any-return]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    turned = x.float() * cos[:, None].float() + torch.cat([-b, a], dim=-1) * sin[:, None].float()
    return turned.to(x)
