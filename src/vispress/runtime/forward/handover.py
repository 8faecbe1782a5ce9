"""Hand the call that runs from a decoder layer's attention to its MLP, which gets no keywords.

A layer's own hooks lie outside of its checkpoint, those of its modules inside. So the call rides on
to the attention as a keyword of the layer, which a second run is given again, and the attention's
hook notes it for the MLP, which is handed hidden states alone.
"""

import weakref
from contextvars import ContextVar
from typing import final

from vispress.runtime.forward.running import Running

Noted = ContextVar["tuple[int, weakref.ref[Running]] | None"]
"""The layer whose attention ran last in a context, and the call. What an interrupted call left
there is replaced by the next attention, and kept alive by nothing."""


@final
class Handover:
    """From the attention of one layer to its MLP.

    Args:
        number: The layer.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.waiting = 0
        """Calls between attention and MLP, in all threads: without any, as in a compiled decode
        step, the context, which would break its graph, is not looked at."""

    def note(self, where: Noted, running: Running | None) -> None:
        """Note the call behind the attention; None where the MLP has nothing to do."""
        if running is None and not self.waiting:
            return
        noted = where.get()
        if running is not None and (noted is None or noted[0] != self.number):
            self.waiting += 1  # else one was interrupted here
        where.set(None if running is None else (self.number, weakref.ref(running)))

    def peek(self, where: Noted) -> Running | None:
        """Give the call whose attention ran here last, if there is one."""
        if not self.waiting:
            return None
        noted = where.get()
        return None if noted is None or noted[0] != self.number else noted[1]()

    def end(self, where: Noted) -> None:
        """Let go of it: the MLP has run."""
        where.set(None)
        self.waiting -= 1
