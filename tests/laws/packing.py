"""Packed rows as laws look at them: several documents in one row of the batch, and each alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tests.tiny import QWEN, VIDEO, Image, Sample, Text, Video, like, make_inputs
from torch import Tensor

# an image at the very start and end of a document, several in one, a document without any
DOCUMENTS = (
    Sample([Text(5), Image(4, 4), Text(7)]),
    Sample([Text(3)]),
    Sample([Image(4, 6), Text(4)], bare=True),
    Sample([Text(2), Image(4, 6), Text(3), Image(6, 4), Text(4)]),
    Sample([Text(6), Image(4, 4)], bare=True),
)
ROWS = ((0, 4, 2), (1, 3))
"""Documents of each row: the image that ends number 4 stands beside the one that begins 2."""
WITH_VIDEOS = (
    Sample([Text(3), Video(3, 4, 4), Text(4), Image(4, 4), Text(5)]),
    Sample([Text(2), Image(4, 6), Text(3)]),
    Sample([Text(4), Video(3, 2, 4), Text(3)]),
)
VIDEO_ROWS = ((0, 1), (2,))

BY_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "labels", "token_type_ids")


@dataclass(frozen=True)
class Packed:
    """One batch of packed rows.

    Args:
        inputs: Arguments of the model.
        spans: Row, first position and the position behind the last, of each document.
        alone: Arguments for each document by itself.
    """

    inputs: dict[str, Any]
    spans: tuple[tuple[int, int, int], ...]
    alone: tuple[dict[str, Any], ...]

    @property
    def documents(self) -> Tensor:
        """`[B, S]` int64, number of the document at each position, -1 on padding."""
        found = torch.full(self.inputs["input_ids"].shape, -1)
        for number, (row, start, stop) in enumerate(self.spans):
            found[row, start:stop] = number
        return found


def positions_of(family: str, model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Position ids of one document: `[1, L]`, or `[4, 1, L]` of text and three axes (M-RoPE)."""
    length = inputs["input_ids"].shape[1]
    text = torch.arange(length)[None]
    if like(family) not in QWEN:
        return text
    axes = text.expand(3, 1, -1)
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    grids = {name: inputs[name] for name in names if name in inputs}
    if grids:
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
        told = {name: inputs[name] for name in names if name in inputs}
        axes, _ = model.model.get_rope_index(**told, **grids)
    return torch.cat([text[None], axes])


def pack(
    family: str,
    model: Any,
    samples: Sequence[Sample] = DOCUMENTS,
    rows: Sequence[Sequence[int]] = ROWS,
    *,
    gap: int = 0,
    order: Sequence[Mapping[str, Any]] | None = None,
) -> Packed:
    """Pack samples, told apart by position ids that start again (no mask, no cache).

    Args:
        family: The family.
        model: Its model, for positions.
        samples: The documents; rows take them in any order.
        rows: Which documents each row holds.
        gap: Tokens of padding behind each document but a row's last.
        order: Arguments for each sample alone, where they are made already.
    """
    turn = [number for row in rows for number in row]
    ordered = [samples[number] for number in turn]
    alone = tuple(make_inputs(family, ordered, only=i) for i in range(len(turn)))
    alone = tuple(order) if order is not None else alone
    inputs = make_inputs(family, ordered, padding="left")
    parts: list[dict[str, Tensor]] = [
        {name: one[name] for name in BY_TOKEN if name in one}
        | {"position_ids": positions_of(family, model, one)}
        for one in alone
    ]
    spans: list[tuple[int, int, int]] = []
    lines: list[dict[str, Tensor]] = []
    for row, numbers in enumerate(rows):
        line: list[dict[str, Tensor]] = []
        for place in range(len(spans), len(spans) + len(numbers)):
            if line and gap:
                line.append(_padding(parts[place], gap))
            start = sum(part["input_ids"].shape[1] for part in line)
            line.append(parts[place])
            spans.append((row, start, start + parts[place]["input_ids"].shape[1]))
        lines.append(_joined(line))
    width = max(line["input_ids"].shape[1] for line in lines)
    filled = [_joined([line, _padding(line, width - line["input_ids"].shape[1])]) for line in lines]
    for name in filled[0]:
        axis = 1 if name == "position_ids" and like(family) in QWEN else 0
        inputs[name] = torch.cat([line[name] for line in filled], dim=axis)
    del inputs["attention_mask"]
    return Packed(inputs | {"use_cache": False}, tuple(spans), alone)


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}


def _padding(like: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    fill = {"labels": -100}
    return {
        name: value.new_full((*value.shape[:-1], length), fill.get(name, 0))
        for name, value in like.items()
    }


def block_diagonal(packed: Packed, dtype: torch.dtype = torch.bool, *, own: bool = True) -> Tensor:
    """`[B, 1, S, S]`: causal within each document; padding sees itself, or (`own`) nothing."""
    documents = packed.documents
    length = documents.shape[1]
    same = (documents[:, :, None] == documents[:, None]) & (documents >= 0)[:, None]
    allowed = same & torch.ones(length, length, dtype=torch.bool).tril()
    if not own:
        allowed |= torch.eye(length, dtype=torch.bool)
    allowed = allowed[:, None]
    if dtype == torch.bool:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


__all__ = [
    "DOCUMENTS", "QWEN", "ROWS", "VIDEO", "VIDEO_ROWS", "WITH_VIDEOS", "Packed",
    "block_diagonal", "pack", "positions_of",
]  # fmt: skip
