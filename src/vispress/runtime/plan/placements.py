"""Bind the placements of a chain of compressors to one model, in the order they act."""

from collections.abc import Sequence
from dataclasses import replace

from vispress.adapters.base import ModelAdapter
from vispress.errors import ConfigError, UnsupportedMethodError
from vispress.methods.base import Compressor
from vispress.runtime.plan.bound import BoundPlacement
from vispress.types import Placement, Positions, Queries, Signal, Stage

_BY_ROW = frozenset({Signal.QUERY_ATTENTION, Signal.MEAN_ATTENTION, Signal.ROTARY_PRIOR})
_MEANS = {Queries.AFTER: Signal.MEAN_ATTENTION, Queries.ALL: Signal.QUERY_ATTENTION}
"""Queries too many to hold a row of each, and the signal that has their mean."""
_FROM_FIRST = (Stage.PRE_LLM, Stage.SKIP, Stage.CACHE, Stage.COMPUTE)
"""Stages that may act in layer 0."""


def bind_placements(
    methods: Sequence[Compressor], adapter: ModelAdapter, positions: Positions | None
) -> tuple[list[BoundPlacement], list[str]]:
    """Placements in the order they act (by layer, then by place in the chain), and remarks.

    Raises:
        ConfigError: A layer is out of range, or a chain member would act before the one it follows.
        UnsupportedMethodError: Compact positions are asked for on a model with three-axis
            positions.
        BudgetError: A method has no budget.
    """
    layers = len(adapter.decoder_layers)
    found: list[tuple[int, int, Compressor, Placement, Positions]] = []
    notes: list[str] = []
    reached = 0
    for number, method in enumerate(methods):
        every = method.placements(layers)
        placements = [
            p if p.until is None else replace(p, stage=Stage.SKIP)
            for p in every
            if p.stage is not Stage.ENCODER
        ]
        if not placements and every and not method.changes_encoder():
            continue  # the encoder's stage says what is missing
        if not placements:
            raise ConfigError(
                f"{method.name} has no placement before or in an LLM of {layers} layers"
            )
        _refuse_what_is_gone(method, found)
        for placement in placements:
            _check(method, placement, layers)
            found.append(
                (placement.layer, number, method, placement, _positions(method, adapter, positions))
            )
        # what leaves the cache leaves it behind the prefill, wherever rows were dropped in it
        evicts = placements[0].stage is Stage.CACHE
        if placements[0].layer < reached and not evicts:
            raise ConfigError(
                f"{method.name} acts before layer {placements[0].layer}, but the compressor "
                "before it in the "
                f"chain acts until layer {reached}; order the chain by layer"
            )
        reached = reached if evicts else max(p.until or p.layer for p in placements)
        notes += _notes(method, placements, layers, adapter, positions)
    found.sort(key=lambda item: item[:2])
    steps = [
        BoundPlacement(i, number, method, placement, where)
        for i, (_, number, method, placement, where) in enumerate(found)
    ]
    return steps, notes


def _refuse_what_is_gone(
    method: Compressor, before: Sequence[tuple[int, int, Compressor, Placement, Positions]]
) -> None:
    """Refuse a method that acts on whole images where another one surely dropped some of them."""
    for *_, other, placement, _ in before:
        drops = placement.stage in (Stage.PRE_LLM, Stage.IN_LLM) and placement.images == "all"
        share = placement.budget.keep_ratio
        surely = drops and not placement.adaptive and share is not None and share < 1
        if method.whole_only() and surely and other.needs in (None, method.needs):
            raise ConfigError(
                f"{method.name} acts on whole images, of which {other.name} before it in the chain "
                f"keeps {share:g}; put {method.name} first, or leave one of them out"
            )


def _check(method: Compressor, placement: Placement, layers: int) -> None:
    low = 0 if placement.stage in _FROM_FIRST else 1
    high = 1 if placement.stage is Stage.PRE_LLM else layers
    if not low <= placement.layer < high:
        raise ConfigError(
            f"{method.name}: layer must be in [{low}, {high}) for a model of {layers} decoder "
            "layers, "
            f"got {placement.layer}"
        )
    mean = _MEANS.get(placement.queries) if placement.queries else None
    other = method.signals() & (_BY_ROW - {mean})
    if mean is not None and other:
        raise ConfigError(
            f"{method.name}: rows of queries={placement.queries!s} are read as their mean alone; "
            f"read {mean.value} in place of {', '.join(sorted(other))}"
        )
    probe = placement.probe
    if probe is not None and (placement.stage is not Stage.PRE_LLM or not 0 <= probe < layers):
        raise ConfigError(
            f"{method.name}: a probe comes before the LLM and reads a decoder layer in "
            f"[0, {layers}), got probe={probe} at stage {placement.stage.value!r}"
        )


def _positions(method: Compressor, adapter: ModelAdapter, asked: Positions | None) -> Positions:
    if asked == "compact" and adapter.mrope:
        raise UnsupportedMethodError(
            f"positions='compact' is not defined for {adapter.family}, whose position ids have "
            "three axes; "
            "use positions='original'"
        )
    return "original" if adapter.mrope else asked or method.default_positions


def _notes(
    method: Compressor,
    placements: Sequence[Placement],
    layers: int,
    adapter: ModelAdapter,
    asked: Positions | None,
) -> list[str]:
    """What a reader of the report must know about choices made here."""
    notes = []
    given = [one.hyperparameters() for one in (method, *method.members())]
    asked_layers = [own[name] for own in given for name in ("layer", "layers") if name in own]
    published = bool(asked_layers) and all(value is None for value in asked_layers)
    where = ", ".join(str(p.layer) for p in placements)
    if layers != 32 and published and any(p.layer for p in placements):
        notes.append(
            f"{method.name}: published layers of a 32-layer LLM, scaled to {layers} layers: {where}"
        )
    for probe in (p.probe for p in placements if p.probe is not None):
        notes.append(
            f"{method.name}: decoder layers 0 to {probe} run once more on the whole prompt before "
            "the LLM, to score; FLOPs leave that out"
        )
    if any(own.get("scores") == "column_mean" for own in given):
        notes.append(
            f"{method.name}: [CLS] attention replaced by the column mean of encoder attention"
        )
    if Signal.PADDING in method.signals() and adapter.square_encoder() is None:
        notes.append(f"{method.name}: {adapter.family} images have no padding to suppress")
    if adapter.mrope and asked is None and method.default_positions == "compact":
        notes.append(f"{method.name}: original positions, compact ones are not defined for M-RoPE")
    return notes
