"""Set up a prefill: find where the images stand and what must be read from attention."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vispress.adapters.base import Modality
from vispress.devices import sent
from vispress.runtime.forward.attention_reads import AttentionRead, attention_layers, mode_of
from vispress.runtime.forward.model_call import ModelCall
from vispress.runtime.forward.prompt_context import note_prompt_context
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.plan.plan import Plan
from vispress.runtime.tokens.images import Image, find_images, make_buckets
from vispress.types import Placement, Queries

_CODES: dict[Modality, int] = {"image": 1, "video": 2}


def find(
    plan: Plan,
    state: ForwardState,
    call: ModelCall,
    embeds: Tensor,
) -> None:
    """Locate the images and set up what must be read from attention."""
    placeholders, captures = plan.adapter.placeholders(), call.captures
    marks = torch.zeros(embeds.shape[:2], dtype=torch.long)
    for modality, token in placeholders.items():
        here = _placeholder_mask(plan, call, token)
        marks = marks.masked_fill(here, _CODES[modality])
    valid = state.host_valid
    valid = torch.ones(marks.shape, dtype=torch.bool) if valid is None else valid
    text = valid & (marks == 0)
    ordered = [captures[modality] for modality in placeholders if modality in captures]
    images = find_images(marks, valid, ordered, _CODES)
    state.images = images
    if plan.reads_context:
        note_prompt_context(images, text, embeds)
    if plan.reads_input:
        state.input_embeddings = embeds.detach()
    if plan.reads_text:
        places = (sent(row.nonzero()[:, 0], embeds.device) for row in text)
        state.text_embeddings = [row[own].detach() for row, own in zip(embeds, places, strict=True)]
    state.buckets = make_buckets(images, embeds.device, by_text=plan.by_text)
    state.reads = _wanted(plan, images, valid)


def _wanted(plan: Plan, images: Sequence[Image], valid: Tensor) -> list[AttentionRead]:
    """Attention rows that the placements read, each once."""
    wanted: list[AttentionRead] = []
    for step in plan.placements:
        placement, reads = step.placement, {*step.method.signals()}
        for layer in attention_layers(placement):
            known = next((w for w in wanted if w.serves(placement, layer)), None)
            if known is None:
                assert placement.queries is not None
                rows = _query_positions(placement.queries, images, valid)
                known = _want(placement, layer, rows, images)
                wanted.append(known)
            known.reads |= reads
            known.readers[step.compressor] = step.method.needs
            known.until = placement.layer
    return wanted


def _want(
    placement: Placement, layer: int, rows: list[list[int]], images: Sequence[Image]
) -> AttentionRead:
    """What is read of a layer for a placement (and others like it): rows of each sample."""
    assert placement.queries is not None
    width = max(map(len, rows))
    padded = [row + row[-1:] * (width - len(row)) if row else [0] * width for row in rows]
    positions = torch.tensor(padded, dtype=torch.long).view(len(rows), width)
    mode, lengths = mode_of(placement), [len(row) for row in rows]
    return AttentionRead(
        layer, placement.queries, mode, positions, lengths, images, set(), placement.layer
    )


def _placeholder_mask(plan: Plan, call: ModelCall, token: int) -> Tensor:
    """`[B, Q]` bool on the host."""
    input_ids = call.arguments.get("input_ids")
    if isinstance(input_ids, Tensor):
        return torch.eq(call.on_host(input_ids), token)
    given: Tensor = call.arguments["inputs_embeds"]
    table = plan.adapter.base.get_input_embeddings()
    own: Tensor = table(torch.tensor(token, device=given.device))
    return torch.eq(given, own).all(-1).cpu()


def _query_positions(queries: Queries, images: Sequence[Image], valid: Tensor) -> list[list[int]]:
    """Chunk positions of the wanted rows of each sample."""
    if queries is Queries.ALL:
        return [[] for _ in valid]
    if queries is Queries.LAST:
        return [row.nonzero()[-1].tolist() for row in valid]
    rows: list[list[int]] = [[] for _ in range(valid.shape[0])]
    for image in images:  # the first image of a sample has the longest list
        behind = image.text_after.tolist()
        if queries is Queries.AFTER:
            whole = valid[image.sample].nonzero()[:, 0]
            behind = whole[whole > image.positions[-1]].tolist() or whole[-1:].tolist()
        rows[image.sample] = max(rows[image.sample], behind, key=len)
    return rows
