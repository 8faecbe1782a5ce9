"""Rows that bypass a span of decoder layers as identity and come back behind it.

Between the layers of the span, hidden states hold all rows; each layer runs on some of them and its
output is put back among the others. So nothing rides outside of what a checkpoint saves.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vispress.runtime.tokens.live_tokens import LiveTokens, gather_rows
from vispress_kernels import Backend


@dataclass(eq=False)
class LayerSkip:
    """One span.

    Args:
        start: First decoder layer of the span.
        until: First layer behind it.
        base: All rows, those between the layers.
        rows: Rows that the layers run on.
        local: `[B, P']`, place of each in `base`.
    """

    start: int
    until: int
    base: LiveTokens
    rows: LiveTokens
    local: Tensor

    def back(self, out: Tensor, hidden: Tensor, backend: Backend) -> Tensor:
        """What left a layer, among the rows that bypassed it."""
        base, rows = self.base.to(out.device), self.rows.to(out.device)
        ran, place = (table.gather(1, base.index) for table in (rows.alive, rows.place))
        return torch.where(ran[..., None], gather_rows(out, place, backend), hidden)


_INSIDE: ContextVar[tuple[tuple[nn.Module, LayerSkip, Tensor, Backend], ...]] = ContextVar(
    "vispress_inside", default=()
)
"""Layers of a span that are running, with the rows that entered."""


def enter(module: nn.Module, span: LayerSkip | None, hidden: Tensor, backend: Backend) -> Tensor:
    """The rows that a layer runs on; `leave` puts them back."""
    if span is None:
        return hidden
    _INSIDE.set((*_INSIDE.get(), (module, span, hidden, backend)))
    return gather_rows(hidden, span.local.to(hidden.device), backend)


def leave(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of a span's layers, called after errors too."""
    if torch.compiler.is_compiling():
        return None
    inside = _INSIDE.get()
    if not inside or inside[-1][0] is not module:
        return None
    _, span, hidden, backend = inside[-1]
    _INSIDE.set(inside[:-1])
    if output is None:  # the layer raised
        return None
    if isinstance(output, tuple):
        return (span.back(output[0], hidden, backend), *output[1:])
    return span.back(output, hidden, backend)
