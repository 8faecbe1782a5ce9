"""Refuse placements that ask for what no call can give, before the first call."""

from collections.abc import Sequence

from vispress.errors import ConfigError
from vispress.kinds import Signal, Stage
from vispress.methods.base import Compressor
from vispress.runtime.forward.attention_reads import attention_layers
from vispress.runtime.plan.bound import BoundPlacement
from vispress.types import Placement

_OF_ATTENTION = frozenset(
    {Signal.QUERY_ATTENTION, Signal.MEAN_ATTENTION, Signal.KEY_NORMS, Signal.ROTARY_PRIOR}
)
"""Signals of the layer whose attention a placement reads."""
PLENTY = 10**6
"""Tokens of no image: a budget that keeps them keeps all, and then nothing is read."""


def check_reads(
    methods: Sequence[Compressor], placements: Sequence[BoundPlacement], layers: int
) -> None:
    """Refuse reads of layers that are none, or behind the placement, and signals of no rows.

    Args:
        methods: The chain.
        placements: Theirs, bound.
        layers: Decoder layers.

    Raises:
        ConfigError: Names the method and the setting.
    """
    for bound in placements:
        _check(bound.method, bound.placement, layers)
    for number, method in enumerate(methods):
        own = [bound.placement for bound in placements if bound.compressor == number]
        reads = sorted(signal.value for signal in method.signals() & _OF_ATTENTION)
        acts = any(p.adaptive or p.budget.resolve(PLENTY) < PLENTY for p in own)
        if acts and reads and all(placement.queries is None for placement in own):
            raise ConfigError(
                f"{method.name} reads {', '.join(reads)}, but none of its placements says whose "
                "attention: set Placement.queries"
            )
        if Signal.TRANSITION in method.signals() and not any(p.transitions for p in own):
            raise ConfigError(
                f"{method.name} reads transition, but none of its placements names the layers that "
                "are measured: set Placement.transitions"
            )
        if Signal.UPDATE_NORM in method.signals() and all(p.layer == 0 for p in own):
            raise ConfigError(
                f"{method.name} reads update_norm, but before decoder layer 0 no layer has moved a "
                "token: act before a later one (Placement.layer)"
            )
        selector = method.cached_selector()
        step = None if selector is None else selector.decode_placement(layers)
        if step is not None and not 1 <= step.layer < layers:
            raise ConfigError(
                f"{method.name} chooses for layers from {step.layer} on while decoding, by the one "
                f"before; the layer must be in [1, {layers})"
            )


def _check(method: Compressor, placement: Placement, layers: int) -> None:
    at, depth = placement.layer, placement.attention_depth
    if placement.until is not None and not at < placement.until <= layers:
        raise ConfigError(
            f"{method.name}: tokens that bypass layers from {at} on come back at until="
            f"{placement.until}, which must be in [{at + 1}, {layers}]"
        )
    wrong = [number for number in placement.transitions if not 0 <= number < at]
    if wrong:
        raise ConfigError(
            f"{method.name}: transitions are of layers before the placement's, [0, {at}), got "
            f"{wrong[0]}"
        )
    if placement.queries is None or placement.stage in (Stage.MASK, Stage.CACHE):
        return
    if placement.stage is Stage.PRE_LLM and placement.probe is None:
        raise ConfigError(
            f"{method.name}: before the LLM no layer has run whose attention it could read; name "
            "one that a probe runs (Placement.probe), or act inside the LLM"
        )
    lone = sorted(s.value for s in method.signals() & (_OF_ATTENTION - {Signal.QUERY_ATTENTION}))
    if depth > 1 and (lone or placement.probe is not None or placement.attention_of == "next"):
        what = f"{', '.join(lone)} is" if lone else "a probe and a look ahead are"
        raise ConfigError(f"{method.name}: {what} of one layer, got attention_depth={depth}")
    if depth < 1 or attention_layers(placement)[0] < 0:
        raise ConfigError(
            f"{method.name}: before layer {at} there are {at} layers to read attention of, got "
            f"attention_depth={depth}"
        )
