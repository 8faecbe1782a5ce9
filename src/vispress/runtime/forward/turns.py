"""Keep account of conversations: which call was the last, and which a report can tell of.

A turn is a call of several tokens, or the first of a `generate`; single tokens behind it, and
drafts that a `generate` checks, belong to it. A conversation is the turns on one KV cache.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vispress.errors import CompressionStateError
from vispress.runtime.forward.owner import generating
from vispress.runtime.forward.prefill_record import PrefillRecord
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.kv_cache.cache_layers import is_compressed, kv_bytes
from vispress.runtime.kv_cache.hf_compat import cache_of
from vispress.runtime.plan.plan import Plan


@dataclass(frozen=True, eq=False)
class Conversation:
    """The last prefill with visual tokens, and what became of its conversation since.

    Args:
        record: The prefill.
        turn: Its turn, from 1.
        turns: Turns by now.
        later: `[B, n]` bool on the host, real tokens among those fed since.
        kv_bytes: Keys and values in the cache now; as the prefill left it where the cache is gone.
    """

    record: PrefillRecord
    turn: int
    turns: int
    later: Tensor
    kv_bytes: int


@dataclass(eq=False)
class _Turn:
    """One turn; nothing of its cache is kept alive."""

    number: int
    cache: "weakref.ref[Cache] | None"
    mask: Tensor | None = None  # `[B, past + Q]` bool of a turn without visual tokens

    def on(self, cache: Cache | None) -> bool:
        return cache is not None and self.cache is not None and self.cache() is cache


class Turns:
    """The account of one model. Copies of the model begin their own."""

    def __init__(self) -> None:
        self._numbers: weakref.WeakKeyDictionary[Cache, int] = weakref.WeakKeyDictionary()
        self._last: _Turn | None = None
        self._prefill: tuple[PrefillRecord, _Turn] | None = None
        self._generate: object = None

    def __reduce__(self) -> Any:
        return Turns, ()

    def note(self, state: ForwardState, record: PrefillRecord | None) -> None:
        """Note a call that compression had a part in; `record` if it brought visual tokens."""
        begins = self._begins(state.plan, state.rows[0][1].length, state.past == 0)
        if record is None and not begins:
            return
        turn = self._turn(state.cache, state.past, begins)
        turn.mask = None if record is not None else state.mask_2d
        self._last = turn
        if record is not None:
            self._prefill = record, turn

    def note_plain(self, plan: Plan, given: Any, output: Any) -> None:
        """Note a call of a conversation that holds no visual tokens.

        Args:
            plan: What is asked of the model.
            given: Keyword arguments of the language model.
            output: What it gave.
        """
        length = int(output[0].shape[1])
        # a static cache's length would be waited for, so single tokens are passed over first
        if not self._begins(plan, length, cache_of(given) is None):
            return
        cache = None if isinstance(output, tuple) else cache_of(output)
        cache = cache_of(given) if cache is None else cache
        past = 0 if cache is None else int(cache.get_seq_length()) - length
        self._last = self._turn(cache, past, begins=True)

    def _begins(self, plan: Plan, length: int, fresh: bool) -> bool:
        """Whether a call begins a turn."""
        generate = generating(plan.adapter.base)
        if generate is None:
            return length > 1 or fresh
        known, self._generate = self._generate, generate
        return known is not generate

    def _turn(self, cache: Cache | None, past: int, begins: bool) -> _Turn:
        before = 0 if cache is None or past <= 0 else self._numbers.get(cache, 1)
        number = max(1, before + begins)
        if cache is None:
            return _Turn(number, None)
        self._numbers[cache] = number
        return _Turn(number, weakref.ref(cache))

    def conversation(self) -> Conversation:
        """Tell of the conversation that the last call belongs to.

        Raises:
            CompressionStateError: It holds no visual tokens, or none that are known here.
        """
        if self._last is None:
            raise CompressionStateError(
                "no report yet: the model saw no visual tokens since it was compressed"
            )
        last = self._last
        held = None if last.cache is None else last.cache()
        if self._prefill is None or not (last is self._prefill[1] or self._prefill[1].on(held)):
            holds = (
                "its KV cache holds those of a prefill before the last; ask behind each prefill"
                if is_compressed(held)
                else "nor does its conversation"
            )
            raise CompressionStateError(
                f"no report: the last call, turn {last.number} of its conversation, held no visual "
                f"tokens, {holds}"
            )
        record, turn = self._prefill
        batch, length = record.layer_alive[0].shape
        none = torch.ones(batch, 0, dtype=torch.bool)
        cache = None if turn.cache is None else turn.cache()
        now = 0 if cache is None else int(cache.get_seq_length())
        if cache is None or now < length or not _holds(cache, batch):
            return Conversation(record, turn.number, last.number, none, record.kv_bytes)
        later = torch.ones(batch, now - length, dtype=torch.bool)
        if last.mask is not None and last.mask.shape[0] == batch:
            known = last.mask[:, length:now].cpu()
            later[:, : known.shape[1]] = known
        return Conversation(record, turn.number, last.number, later, kv_bytes(cache))


def _holds(cache: Cache, batch: int) -> bool:
    """Whether a cache has as many rows as a prefill left in it."""
    keys = [layer.keys for layer in cache.layers if layer.keys is not None]
    return bool(keys) and len(keys[0]) == batch
