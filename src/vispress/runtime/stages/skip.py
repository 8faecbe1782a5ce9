"""Let rows bypass a span of decoder layers and come back behind it: `Stage.SKIP`.

They come back as they were, or times their gate where the method has one, which also scales what
the MLPs of the span add to the rows that run. Between the layers of the span, hidden states hold
all rows; each layer runs on some of them and its output is put back among the others. So nothing
rides outside of what a checkpoint saves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import final

import torch
from torch import Tensor

from vispress.errors import ConfigError
from vispress.runtime.forward.apply_placement import Choice, choose, unasked
from vispress.runtime.forward.attention_reads import attention_layers
from vispress.runtime.forward.decision import Decision
from vispress.runtime.forward.state import ForwardState, Span
from vispress.runtime.plan.bound import BoundPlacement
from vispress.runtime.stages.base import Binding, RuntimeStage, StageCall
from vispress.runtime.tokens.live_tokens import LiveTokens, gather_rows, narrow, scale_rows
from vispress.types import Stage

CARRIES = frozenset({Stage.SKIP})


@dataclass(frozen=True, eq=False)
class LayerSkip(Span):
    """One span of layers.

    Args:
        base: All rows, those between the layers.
        local: `[B, P']`, place of each row that runs in `base`.
        gates_bypassed: Whether rows that bypass the span are multiplied by the gate.
    """

    base: LiveTokens
    local: Tensor
    gates_bypassed: bool


def bind(binding: Binding) -> RuntimeStage | None:
    """Make the stage of a chain in which tokens bypass layers.

    Raises:
        ConfigError: A placement reads attention of a layer that some tokens bypass.
    """
    placements = binding.carried_by(CARRIES)
    if not placements:
        return None
    _refuse_bypassed_reads(binding.placements)
    spans = [range(bound.placement.layer, bound.placement.until or 0) for bound in placements]
    gated = [span for bound, span in zip(placements, spans, strict=True) if bound.method.gates]
    read = {layer for bound in placements for layer in attention_layers(bound.placement)}
    return RuntimeStage(
        carries=CARRIES,
        open=_open,
        order=30,
        watched_layers=frozenset(read),
        left_layers=frozenset(layer for span in spans for layer in span),
        gated_layers=frozenset(layer for span in gated for layer in span),
    )


def _open(state: ForwardState) -> StageCall | None:
    if not state.images:
        return None
    skips = _Skips(state)
    own = [bound for bound in state.plan.placements if bound.placement.stage in CARRIES]
    return StageCall(
        place=skips.place,
        enter=skips.enter,
        leave=skips.leave,
        remarks=partial(unasked, state, own),
    )


@final
@dataclass(eq=False)
class _Skips:
    """The spans of one call.

    Args:
        state: The call.
        entered: By layer that is running, the rows in front of it.
    """

    state: ForwardState
    entered: dict[int, Tensor] = field(default_factory=dict)

    def place(self, bound: BoundPlacement, hidden: Tensor) -> Decision | None:
        """Choose the rows that run; the decision itself drops nothing but padding."""
        state, placement = self.state, bound.placement
        choice = choose(state, bound, hidden)
        state.buckets = choice.entered
        if choice.empty:
            return None
        rows = state.last.to(hidden.device)
        narrowed = partial(narrow, compact=bound.positions == "compact")
        base, local = rows, None
        if rows.whole:  # padding goes; later spans find none
            none = torch.zeros_like(choice.drop), (0,) * len(choice.drop_counts)
            still = (0,) * len(choice.document_drops)
            base, local = narrowed(rows, *none, valid=state.valid_rows(rows), document_drops=still)
        some, inner = narrowed(
            base,
            choice.drop,
            choice.drop_counts,
            valid=base.valid,
            document_drops=choice.document_drops,
        )
        assert placement.until is not None
        bypassed = any(plan.bypassed == "gated" for _, plan in choice.gates)
        span = placement.layer, placement.until, some, _gate(choice), base, inner, bypassed
        state.spans.append(LayerSkip(*span))
        return None if local is None else Decision(rows, base, local, [], state.plan.backend)

    def enter(self, number: int, hidden: Tensor) -> Tensor:
        """Take the rows that a layer runs on; `leave` puts them back."""
        span = self.state.span_at(number)
        if not isinstance(span, LayerSkip):
            return hidden
        self.entered[number] = hidden
        return gather_rows(hidden, span.local.to(hidden.device), self.state.plan.backend)

    def leave(self, number: int, out: Tensor) -> Tensor:
        """Put what left a layer among the rows that bypassed it."""
        span = self.state.span_at(number)
        if not isinstance(span, LayerSkip):
            return out
        hidden = self.entered.pop(number)
        base, rows = span.base.to(out.device), span.rows.to(out.device)
        if span.gate is not None and span.gates_bypassed:
            hidden = scale_rows(hidden, span.gate, base)
        if rows.valid is None:
            return hidden.scatter(
                1, span.local.to(out.device)[..., None].expand_as(out), out.to(hidden.dtype)
            )
        ran, place = (table.gather(1, base.index) for table in (rows.alive, rows.place))
        back = gather_rows(out, place, self.state.plan.backend)
        return torch.where(ran[..., None], back, hidden)


def _gate(choice: Choice) -> Tensor | None:
    """`[B, Q]`: the gates of all images, 1 for other tokens (differentiable)."""
    if not choice.gates:
        return None
    gates = [plan.gate for _, plan in choice.gates if plan.gate is not None]
    whole = torch.ones(choice.drop.shape, dtype=gates[0].dtype, device=choice.drop.device)
    for (bucket, _), own in zip(choice.gates, gates, strict=True):
        sample = bucket.sample.unsqueeze(1).expand_as(bucket.positions)
        whole = whole.index_put((sample, bucket.positions), own)
    return whole


def _refuse_bypassed_reads(placements: Sequence[BoundPlacement]) -> None:
    spans = [bound.placement for bound in placements if bound.placement.until is not None]
    for bound in placements:
        if bound.placement.probe is not None:  # it is over before any span begins
            continue
        for layer in attention_layers(bound.placement):
            for span in spans:
                if span.layer <= layer < (span.until or 0):
                    raise ConfigError(
                        f"{bound.method.name} reads the attention of decoder layer {layer}, but "
                        f"some tokens bypass layers {span.layer} to {(span.until or 0) - 1}; act "
                        "later"
                    )
