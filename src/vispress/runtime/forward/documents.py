"""Read from a call which documents its rows hold and where their prompts end."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vispress.devices import sent
from vispress.errors import ConfigError, UnsupportedModelError
from vispress.runtime.forward.model_call import ModelCall
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.layout import (
    Document,
    PromptEnds,
    PromptLayout,
    check_lengths,
    check_sizes,
    split_documents,
    whole_rows,
)
from vispress.runtime.tokens.live_tokens import VARLEN
from vispress.runtime.tokens.masks import allowed, check_implementation

IGNORED = -100
"""Label of a token that no loss is taken on."""


def find_documents(state: ForwardState, given: Mapping[str, Any]) -> tuple[Document, ...]:
    """Find the documents of a chunk, as the model itself tells them apart; note them in the state.

    Args:
        state: The call.
        given: Keyword arguments of the language model.
    """
    live = state.rows[0][1]
    batch, length = live.index.shape
    breaks = None if state.past or length < 2 else _breaks(state, given, batch, length)
    if breaks is None or not bool(breaks[:, 1:].any()):
        return whole_rows(batch, length)
    if state.plan.linear:
        raise UnsupportedModelError(
            "rows hold several documents, and layers with linear attention carry their states from "
            "one to the next (transformers tells them apart in attention alone); give each "
            "document a row of its own"
        )
    documents = split_documents(breaks)
    state.packed = True
    valid = state.host_valid
    starts = torch.zeros(batch, length, dtype=torch.long)
    counts = []
    for document in documents:
        span = slice(document.start, document.stop)
        starts[document.row, span] = document.start
        whole = document.stop - document.start
        counts.append(whole if valid is None else int(valid[document.row, span].sum()))
    packed = replace(
        live, starts=sent(starts, live.index.device), document_counts=tuple(counts), _twins={}
    )
    state.rows[0] = (0, packed)
    return documents


def _breaks(
    state: ForwardState, given: Mapping[str, Any], batch: int, length: int
) -> Tensor | None:
    """`[B, Q]` bool: tokens that are not of the document of the one before; None: no sign of it."""
    mask, ids = given.get("attention_mask"), given.get("position_ids")
    if isinstance(ids, Tensor) and ids.ndim == 3:  # M-RoPE: positions of text come first of four
        ids = ids[0] if len(ids) == 4 else None
    if check_implementation(state.plan.implementation) == "flash":
        # a kernel that is handed a mask takes each row for one document; one of ones is not handed
        return None if state.chunk_valid is not None else _flat_breaks(given, ids, batch, length)
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
        if mask is None:
            return None
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return _breaks_of_mask(mask, state.host_valid, batch)
    if mask is not None or state.cache is not None or not isinstance(ids, Tensor):
        return None
    # as transformers recognises packed rows: positions that do not go on by one
    breaks = torch.zeros(batch, length, dtype=torch.bool)
    breaks[:, 1:] = (ids.diff(dim=-1) != 1).cpu().expand(batch, -1)
    return breaks


def _flat_breaks(given: Mapping[str, Any], ids: Any, batch: int, length: int) -> Tensor | None:
    """As `_breaks`, for a varlen kernel: it takes the whole batch for one row, with bounds.

    Raises:
        ConfigError: A document goes over the end of a row or of the batch.
    """
    bounds: Tensor | None = given.get("cu_seq_lens_q")
    if bounds is None or any(
        given.get(name) is None for name in VARLEN
    ):  # bounds are found by positions
        if batch > 1 or not isinstance(ids, Tensor):
            return None
        places: Tensor = ids.cpu()
        if torch.equal(places[0], torch.arange(length) + places.min()):
            return None
        return places == places.min()
    ends = set(bounds.tolist())
    rows = range(0, batch * length, length)
    if not ends.issuperset(rows) or max(ends) > batch * length:
        raise ConfigError(
            f"cu_seq_lens_q {sorted(ends)} does not fit {batch} rows of {length} tokens: the "
            "bounds are those of the rows one behind the other, and each row begins a document"
        )
    breaks = torch.zeros(batch * length + 1, dtype=torch.bool)
    breaks[sorted(ends)] = True
    return breaks[:-1].view(batch, length)


def _breaks_of_mask(mask: Tensor, valid: Tensor | None, batch: int) -> Tensor:
    """`[B, Q]` bool: real tokens that do not see the real token before them."""
    seen = allowed(mask)
    seen = seen.expand(batch, -1, -1)
    length = seen.shape[1]
    before = (torch.arange(length) - 1).expand(batch, -1)
    if valid is not None:  # padding between documents is passed over
        places = torch.arange(length).expand(batch, -1).masked_fill(~valid, -1)
        before = torch.cat([before[:, :1], places.cummax(dim=1).values[:, :-1]], dim=1)
    index = before.clamp(min=0).to(seen.device).unsqueeze(-1)
    breaks = ~seen.gather(2, index)[:, :, 0].cpu() & (before >= 0)
    return breaks if valid is None else breaks & valid


def find_ends(call: ModelCall, documents: Sequence[Document], state: ForwardState) -> PromptEnds:
    """Find where prompts end: at a length that was given, else before what is supervised.

    Raises:
        ConfigError: Not one length a document was given, or one that ends behind it.
    """
    live = state.rows[0][1]
    batch, length = live.index.shape
    if call.prompt_lengths is not None:
        lengths = [int(count) for count in call.prompt_lengths]
        check_lengths(lengths, documents)
        if state.past:  # the chunk does not show all of a document
            before = [state.past] * batch
            if state.mask_2d is not None:
                before = state.mask_2d[:, : state.past].sum(1).tolist()
            lengths = [max(0, n - gone) for n, gone in zip(lengths, before, strict=True)]
        else:
            check_sizes(lengths, documents, state.host_valid)
        return PromptEnds(lengths=lengths)
    supervised = None
    if isinstance(call.shift_labels, Tensor) and call.shift_labels.shape == (batch, length):
        taught = call.shift_labels.cpu() != IGNORED
        supervised = torch.zeros(batch, length, dtype=torch.bool)
        supervised[:, 1:] = taught[:, :-1]
    elif isinstance(call.labels, Tensor) and call.labels.shape == (batch, length):
        supervised = call.labels.cpu() != IGNORED
    return PromptEnds(supervised)


def warn_of_taught_images(ends: PromptEnds, layout: PromptLayout | None) -> None:
    """Warn of labels on visual tokens: nothing then says where the prompt ends behind an image."""
    taught = ends.supervised
    if taught is None or layout is None:
        return
    runs = ((image.row, *run) for image in layout.images for run in image.runs)
    if any(bool(taught[row, start:stop].any()) for row, start, stop in runs):
        warnings.warn(
            "labels are on visual tokens: those that are dropped predict nothing, and an image "
            "passes whole where a method asks the prompt, as the prompt is told from the answer "
            "by its labels of -100. Set them on placeholders and questions (TRL: data of prompt "
            "and completion, or assistant_only_loss=True)",
            stacklevel=2,
        )
