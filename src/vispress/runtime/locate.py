"""Set up a prefill: where the images stand, and what must be read from attention."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vispress.adapters.base import Modality
from vispress.runtime.capture import Capture
from vispress.runtime.images import Image, find_images, make_buckets
from vispress.runtime.seen import Wanted, attention_layers
from vispress.runtime.state import ForwardState
from vispress.runtime.surroundings import note_surroundings
from vispress.types import Placement, Queries, Signal

if TYPE_CHECKING:
    from vispress.runtime.attach import Attachment

_CODES: dict[Modality, int] = {"image": 1, "video": 2}


def find(
    attachment: "Attachment",
    state: ForwardState,
    arguments: Mapping[str, Any],
    captures: Mapping[Modality, Capture],
    embeds: Tensor,
) -> None:
    """Locate the images and set up what must be read from attention."""
    placeholders = attachment.adapter.placeholders()
    marks = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    for modality, token in placeholders.items():
        marks = marks.masked_fill(
            _placeholder_mask(attachment, arguments, token, embeds), _CODES[modality]
        )
    valid = (
        torch.ones_like(marks) if state.chunk_valid is None else state.chunk_valid.to(marks.device)
    )
    host_marks, host_valid = torch.stack([marks, valid.long()]).cpu()  # the one sync of a prefill
    ordered = [captures[modality] for modality in placeholders if modality in captures]
    images = find_images(host_marks, host_valid.bool(), ordered, _CODES)
    state.images = images
    apart = any(step.placement.images != "all" for step in attachment.steps)
    if apart or any(Signal.CONTEXT in method.signals() for method in attachment.methods):
        note_surroundings(images, host_valid.bool() & (host_marks == 0), embeds)
    if attachment.reads_input:
        state.input_embeddings = embeds.detach()
    if attachment.reads_text:
        text = (host_valid.bool() & (host_marks == 0)).to(embeds.device)
        state.text_embeddings = [row[keep].detach() for row, keep in zip(embeds, text, strict=True)]
    queries = {step.placement.queries for step in attachment.steps} - {None}
    by_text = attachment.reads_text or Queries.TEXT_AFTER in queries
    state.buckets = make_buckets(images, embeds.device, by_text=by_text)
    state.wanted = _wanted(attachment, images, host_valid.bool())


def _wanted(attachment: "Attachment", images: Sequence[Image], valid: Tensor) -> list[Wanted]:
    """Attention rows that the placements read, each once."""
    wanted: list[Wanted] = []
    for step in attachment.steps:
        placement, reads = step.placement, {*step.method.signals()}
        for layer in attention_layers(placement):
            known = next((w for w in wanted if w.serves(placement, layer)), None)
            if known is None:
                assert placement.queries is not None
                known = _want(placement, layer, _query_positions(placement.queries, images, valid))
                wanted.append(known)
            known.reads |= reads
            known.readers[step.compressor] = step.method.needs
            known.until = placement.layer
    return wanted


def _want(placement: Placement, layer: int, rows: list[list[int]]) -> Wanted:
    """What is read of a layer for a placement (and others like it): rows of each sample."""
    assert placement.queries is not None
    width = max(map(len, rows))
    padded = [row + row[-1:] * (width - len(row)) if row else [0] * width for row in rows]
    positions = torch.tensor(padded, dtype=torch.long).view(len(rows), width)
    peek, lengths = placement.attention_of == "next", [len(row) for row in rows]
    return Wanted(layer, placement.queries, peek, positions, lengths, set(), placement.layer)


def _placeholder_mask(
    attachment: "Attachment", arguments: Mapping[str, Any], token: int, embeds: Tensor
) -> Tensor:
    input_ids = arguments.get("input_ids")
    if isinstance(input_ids, Tensor):
        return torch.eq(input_ids, token).to(embeds.device)
    given: Tensor = arguments["inputs_embeds"]
    table = attachment.adapter.base.get_input_embeddings()
    own: Tensor = table(torch.tensor(token, device=given.device))
    return torch.eq(given, own).all(-1).to(embeds.device)


def _query_positions(queries: Queries, images: Sequence[Image], valid: Tensor) -> list[list[int]]:
    """Chunk positions of the wanted rows of each sample."""
    if queries is Queries.ALL:
        return [[] for _ in valid]
    if queries is Queries.LAST:
        return [row.nonzero()[-1].tolist() for row in valid]
    rows: list[list[int]] = [[] for _ in range(valid.shape[0])]
    for image in images:  # the first image of a sample has the longest list
        rows[image.sample] = max(rows[image.sample], image.text_after.tolist(), key=len)
    return rows
