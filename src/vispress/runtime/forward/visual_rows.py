"""Tell visual rows of a decoder layer from others, without waiting for the device."""

from functools import cached_property
from typing import NamedTuple, final

import torch
from torch import Tensor

from vispress.devices import sent
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.tokens.live_tokens import LiveTokens


class Split(NamedTuple):
    """Rows of a layer, all samples as one: where visual ones stand, then the others, and back."""

    visual: Tensor
    other: Tensor
    back: Tensor


@final
class VisualRows:
    """The visual rows of one call.

    Args:
        state: The call.
    """

    def __init__(self, state: ForwardState) -> None:
        self.state = state
        # by the id of rows, which stand beside the value: so they live, and no other get it
        self._splits: dict[tuple[int, torch.device], tuple[LiveTokens, Split | None]] = {}

    @cached_property
    def marks(self) -> Tensor:
        """`[B, Q]` bool on the host: visual tokens that are not masked."""
        marks = torch.zeros(self.state.rows[0][1].index.shape, dtype=torch.bool)
        for image in self.state.images:
            shown = slice(None) if image.shown is None else image.shown
            marks[image.sample, image.positions[shown]] = True
        return marks

    @cached_property
    def prompt(self) -> Tensor:
        """`[B, Q]` bool on the host: real tokens that are of no answer, taught or generated."""
        state = self.state
        assert state.asking is not None
        assert state.layout is not None
        asking = state.asking.clone()
        for number, document in enumerate(state.layout.documents):
            ends = [end for p in state.layout.prompts if p.document == number for end in p.ends]
            if ends:
                asking[document.row, max(ends) + 1 : document.stop] = False
        return asking

    def of(self, rows: LiveTokens, device: torch.device) -> Tensor:
        """`[B, P]` bool: which of some rows are visual."""
        here = sent(self.marks, device).gather(1, rows.index)
        valid = self.state.valid_rows(rows)
        return here if valid is None else here & valid.to(device)

    def split(self, number: int, device: torch.device) -> Split | None:
        """Part the rows of a decoder layer; None where none is visual."""
        rows = self.state.rows_at(number).to(device)
        key = id(rows), device
        if key not in self._splits:
            # text stays, so what else there is can be counted on the host
            text = sum(self.state.rows[0][1].counts) - int(self.marks.sum())
            visual = sum(rows.counts) - text
            order = self.of(rows, device).flatten().logical_not().long().argsort(stable=True)
            split = Split(order[:visual], order[visual:], order.argsort())
            self._splits[key] = rows, (split if visual else None)
        return self._splits[key][1]
