"""Conversations: later turns asked on the cache that the earlier ones left.

The history is what the model itself has read and written: the prompt, its own answer, right or
wrong, then the text of the next turn. The end-of-sequence token never enters it: a chat model that
wants one between turns has it in the next text. No padding falls inside: after each turn the batch
is split into rows whose answer and next text are equally long, each with its own rows of the cache.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vispress.runtime.kv_cache.hf_compat import CACHE

_GROWING = {"input_ids": None, "attention_mask": 1, "mm_token_type_ids": 0}
"""Inputs as long as the sequence, and what new tokens add to them."""


@torch.inference_mode()
def converse(
    model: Any,
    tokenizer: Any,
    inputs: Any,
    followups: Sequence[Sequence[str]],
    max_new_tokens: int,
) -> list[tuple[str, ...]]:
    """Answer every turn greedily, through `model.generate`; the cache is kept between turns.

    Args:
        model: Compressed or not.
        tokenizer: Its tokenizer.
        inputs: Left-padded inputs of the first turn.
        followups: Texts of the later turns of each row.
        max_new_tokens: Of each answer.

    Returns:
        One answer a turn, for each row.
    """
    answers: list[list[str]] = [[] for _ in followups]
    conversation = _Conversation(model, tokenizer, max_new_tokens, followups, answers)
    cache = DynamicCache(config=model.config.get_text_config())
    _ask_turn(conversation, list(range(len(followups))), dict(inputs), cache)
    return [tuple(turns) for turns in answers]


@dataclass(frozen=True)
class _Conversation:
    """Settings and answers that all turns of a batch share."""

    model: Any
    tokenizer: Any
    max_new_tokens: int
    followups: Sequence[Sequence[str]]
    answers: list[list[str]]

    @property
    def ends(self) -> list[int]:
        """Token ids that end an answer."""
        ids = self.model.generation_config.eos_token_id
        return [] if ids is None else list(ids) if isinstance(ids, list) else [int(ids)]

    def goes_on(self, row: int) -> bool:
        """Tell whether a row has a turn that is not asked yet."""
        return len(self.followups[row]) >= len(self.answers[row])

    def next_text(self, row: int) -> Tensor:
        """Tokenise a row's next turn."""
        text = self.followups[row][len(self.answers[row]) - 1]
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return ids[0].to(self.model.device)  # type: ignore[no-any-return]


def _ask_turn(
    conversation: _Conversation, rows: list[int], inputs: dict[str, Any], cache: Any
) -> None:
    """Ask some rows their next turn, then the later ones."""
    out = conversation.model.generate(
        **inputs, **{CACHE: cache}, max_new_tokens=conversation.max_new_tokens, do_sample=False
    )
    new = out[:, inputs["input_ids"].shape[1] :]
    ended = torch.isin(new, torch.tensor(conversation.ends, device=new.device, dtype=new.dtype))
    lengths = torch.where(ended.any(1), ended.long().argmax(1), new.shape[1]).tolist()
    said = [row[:length] for row, length in zip(new, lengths, strict=True)]
    words = conversation.tokenizer.batch_decode(said, skip_special_tokens=True)
    for row, answer in zip(rows, words, strict=True):
        conversation.answers[row].append(answer.strip())
    if any(map(conversation.goes_on, rows)):
        _ask_next_turns(conversation, rows, inputs, cache, new, lengths)


def _ask_next_turns(
    conversation: _Conversation,
    rows: list[int],
    inputs: dict[str, Any],
    cache: Any,
    new: Tensor,
    lengths: list[int],
) -> None:
    """Split a batch by the length of answer and next text, and ask each part its next turn."""
    parts: dict[tuple[int, int], list[int]] = {}
    texts: dict[int, Tensor] = {}
    for at, row in enumerate(rows):
        if conversation.goes_on(row):
            texts[at] = conversation.next_text(row)
            parts.setdefault((lengths[at], len(texts[at])), []).append(at)
    start = inputs["input_ids"].shape[1]
    # M-RoPE models keep the offset of each row's positions on the module
    deltas = getattr(conversation.model.model, "rope_deltas", None)
    for (length, _), places in parts.items():
        pick = torch.tensor(places, device=new.device)
        asked = torch.stack([texts[at] for at in places])
        added = torch.cat([new[pick, :length], asked], dim=1)
        grown = _grown(inputs, pick, added)
        part = _cache_rows(cache, pick)
        # steps that longer answers of the batch took; the cache may hold less than the history
        if (extra := part.get_seq_length() - (start + length)) > 0:
            part.crop(-extra)
        if deltas is not None:
            conversation.model.model.rope_deltas = deltas[pick.to(deltas.device)]
        _ask_turn(conversation, [rows[at] for at in places], grown, part)


def _grown(inputs: dict[str, Any], pick: Tensor, added: Tensor) -> dict[str, Any]:
    """Extend the inputs to a later turn: the whole sequence, without pictures."""
    grown = {}
    for name, fill in _GROWING.items():
        if name in inputs:
            tail = added if fill is None else torch.full_like(added, fill)
            grown[name] = torch.cat([inputs[name][pick], tail.to(inputs[name].dtype)], dim=1)
    return grown


def _cache_rows(cache: Any, pick: Tensor) -> Any:
    """Copy some rows of a cache to a cache of their own."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    part.batch_select_indices(pick)
    return part
