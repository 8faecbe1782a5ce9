"""Keep account of conversations: which turn was the last, and which prefill a report tells of.

A turn is a call of several tokens, or the first of a `generate`; single tokens behind it, and
drafts that a `generate` checks, belong to it. A conversation is the turns on one KV cache, which
carries its last turn; the prefills are kept by the model, as long as their turns are.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn
from transformers.cache_utils import Cache

from vispress.errors import CompressionStateError
from vispress.runtime.forward.owner import amid_chunks, begins_turn
from vispress.runtime.forward.prefill_record import PrefillRecord
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.kv_cache.cache_layers import kv_bytes
from vispress.runtime.kv_cache.hf_compat import cache_of
from vispress.runtime.plan.plan import Plan

_ATTRIBUTE: Final = "_vispress_turn"


@dataclass(frozen=True, eq=False)
class Turn:
    """A conversation behind the prefill of one turn.

    Args:
        number: From 1.
        length: Tokens of the conversation, padding included.
        kv_bytes: Bytes of keys and values in its cache.
        shown: The last turn with visual tokens; 0 for none.
        rows: B of a turn of text.
        mask: `[B, length]` bool, real tokens of a turn of text; None where all are.
    """

    number: int
    length: int
    kv_bytes: int = 0
    shown: int = 0
    rows: int = 0
    mask: Tensor | None = None

    def __deepcopy__(self, memo: Any) -> "Turn":
        """Stay: a copy of a cache goes on in the same conversation."""
        return self


class Turns:
    """The account of one model."""

    def __init__(self) -> None:
        self._last: Turn | None = None
        self._records: weakref.WeakKeyDictionary[Turn, PrefillRecord] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> Any:
        return Turns, ()  # a copy of the model begins its own

    def note(self, state: ForwardState, record: PrefillRecord | None) -> None:
        """Note a call that compression had a part in; `record` if it brought visual tokens."""
        rows, length = state.rows[0][1].index.shape
        begins = begins_turn(state.plan.adapter.base, length, fresh=state.past == 0)
        if record is None and not begins and not amid_chunks(state.plan.adapter.base):
            return
        before = _turn_of(state.cache, state.past)
        number, total = max(1, before.number + begins), state.past + length
        if record is None:
            size, record = kv_bytes(state.cache), self._records.get(before)
            turn = Turn(number, total, size, before.shown, rows, state.mask_2d)
        else:
            turn = Turn(number, total, record.kv_bytes, number)
        if record is not None:
            self._records[turn] = record
        self._end(turn, state.cache)

    def note_again(
        self, base: nn.Module, record: PrefillRecord, length: int, cache: Cache | None
    ) -> None:
        """Note a prefill of a conversation's first turn that ran without Python.

        Args:
            base: The base model.
            record: Of this prefill.
            length: Tokens of the call.
            cache: Its KV cache, if it has one.
        """
        begins_turn(base, length, fresh=True)
        turn = Turn(1, length, record.kv_bytes, 1)
        self._records[turn] = record
        self._end(turn, cache)

    def note_plain(self, plan: Plan, given: Mapping[str, Any], output: Any) -> None:
        """Note a call of a conversation that holds no visual tokens.

        Args:
            plan: What is asked of the model.
            given: Keyword arguments of the language model.
            output: What it gave.
        """
        length, cache = int(output[0].shape[1]), cache_of(given)
        fresh = cache is None
        if cache is None and not isinstance(output, tuple):
            cache = cache_of(output)
        self.note_text(plan.adapter.base, length, cache, fresh=fresh)

    def note_text(self, base: nn.Module, length: int, cache: Cache | None, *, fresh: bool) -> None:
        """Note the same of a call that may have run without Python.

        Args:
            base: The base model.
            length: Tokens of the call.
            cache: Its KV cache behind it, if it has one.
            fresh: Whether it was given none.
        """
        # ahead of a static cache's length, which would be waited for
        begins = begins_turn(base, length, fresh=fresh)
        if not begins and not amid_chunks(base):
            return
        total = length if cache is None else int(cache.get_seq_length())
        before = _turn_of(cache, total - length)
        self._end(Turn(max(1, before.number + begins), total), cache)

    def _end(self, turn: Turn, cache: Cache | None) -> None:
        self._last = turn
        if cache is not None:
            setattr(cache, _ATTRIBUTE, turn)

    def last(self) -> tuple[Turn, PrefillRecord]:
        """Give the last turn, and the last prefill with visual tokens of its conversation.

        Raises:
            CompressionStateError: It had none, or none since the model was compressed.
        """
        turn = self._last
        if turn is None:
            raise CompressionStateError(
                "no report yet: the model saw no visual tokens since it was compressed"
            )
        record = self._records.get(turn)
        if record is None:
            which = "those of a compression before" if turn.shown else "no visual tokens"
            raise CompressionStateError(
                f"no report: the last call was turn {turn.number} of a conversation of "
                f"{turn.length} tokens, which holds {which}"
            )
        return turn, record


def _turn_of(cache: Cache | None, past: int) -> Turn:
    """The last turn on a cache that holds `past` tokens."""
    if cache is None or past <= 0:  # it may be used again
        return Turn(0, 0)
    found: Turn = getattr(cache, _ATTRIBUTE, None) or Turn(1, past)
    return found
