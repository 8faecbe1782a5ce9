"""Let decoder layers compute less for visual tokens: `Stage.COMPUTE`.

All rows stay. The MLP of such a layer runs twice: whole on text, and on some of its neurons for
visual tokens. A call without images, as a decode step is, is the untouched model's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from vispress.adapters.decoder import check_gated_mlp, run_neurons
from vispress.devices import sent
from vispress.errors import ConfigError
from vispress.methods.base import Compressor
from vispress.methods.compute_pruner import LayerCompute
from vispress.runtime.forward.apply_placement import note_all_kept
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.stages.base import Binding, RuntimeStage, StageCall
from vispress.types import Stage

CARRIES = frozenset({Stage.COMPUTE})


def bind(binding: Binding) -> RuntimeStage | None:
    """Make the stage of a chain with a method that computes less for visual tokens.

    Raises:
        ConfigError: There are two, what a probe reads would not be what runs, or no neuron is left.
        UnsupportedModelError: An FFN is not built as the slices need it.
    """
    placements = binding.carried_by(CARRIES)
    if not placements:
        return None
    methods = list(dict.fromkeys(bound.compressor for bound in placements))
    if len(methods) > 1:
        names = " and ".join(bound.method.name for bound in placements)
        raise ConfigError(
            f"{names} both say what layers compute for visual tokens, and one of a chain can; "
            "leave one out"
        )
    method = placements[0].method
    pruner = method.compute_pruner()
    if pruner is None:
        raise ConfigError(
            f"{method.name} has a placement at stage {Stage.COMPUTE.value!r} and says not what is "
            "computed there: give it compute_pruner()"
        )
    layers = pruner.compute(len(binding.adapter.decoder_layers))
    part = ComputePart(method, layers, _neurons(binding, method, layers))
    _refuse_probes(binding, part)
    binding.notes.extend(part.notes())
    return RuntimeStage(
        carries=CARRIES, open=part.open, order=55, mlp_layers=frozenset(part.neurons)
    )


def _neurons(
    binding: Binding, method: Compressor, layers: Sequence[LayerCompute]
) -> dict[int, int]:
    """Neurons of visual tokens in each layer that has less of them than all."""
    found = {}
    adapter = binding.adapter
    for number, (layer, own) in enumerate(zip(adapter.decoder_layers, layers, strict=True)):
        if own.ffn_ratio == 1:
            continue
        every = check_gated_mlp(adapter.family, number, layer)
        if every < own.ffn_ratio:
            raise ConfigError(
                f"{method.name}: ffn_ratio={own.ffn_ratio} leaves visual tokens none of the "
                f"{every} neurons of decoder layer {number}; it can be at most {every}"
            )
        found[number] = every // own.ffn_ratio
    return found


def _refuse_probes(binding: Binding, part: "ComputePart") -> None:
    for bound in binding.placements:
        probe = bound.placement.probe
        if probe is not None and any(number < probe for number in part.neurons):
            raise ConfigError(
                f"{bound.method.name} reads decoder layer {probe} in a probe, which computes all "
                f"that {part.method.name} leaves out of the layers before it; leave one of them out"
            )


class _Split(NamedTuple):
    """Rows of a layer, all samples as one: where visual ones stand, then the others, and back."""

    visual: Tensor
    other: Tensor
    back: Tensor


@final
@dataclass(frozen=True, eq=False)
class ComputePart:
    """A method that computes less for visual tokens, on one model.

    Args:
        method: The compressor.
        layers: What each decoder layer computes.
        neurons: By layer, those that visual tokens go through.
    """

    method: Compressor
    layers: Sequence[LayerCompute]
    neurons: dict[int, int]

    def notes(self) -> list[str]:
        """Say for reports what is computed."""
        if not self.neurons:
            return []
        shares = sorted({f"1/{self.layers[number].ffn_ratio}" for number in self.neurons})
        return [
            f"{self.method.name}: visual tokens go through the first {', '.join(shares)} of the "
            f"FFN neurons of decoder layers {min(self.neurons)} to {max(self.neurons)}"
        ]

    def open(self, state: ForwardState) -> StageCall | None:
        """Begin a call that brings images."""
        if not state.images:
            return None
        place = partial(note_all_kept, state)
        if not self.neurons:
            return StageCall(place=place)
        return StageCall(place=place, feed_forward=_Feeding(state, self.neurons).run)


@final
@dataclass(eq=False)
class _Feeding:
    """The MLPs of one call.

    Args:
        state: The call.
        neurons: By layer, those that visual tokens go through.
    """

    state: ForwardState
    neurons: dict[int, int]
    # keys hold ids of rows, which the state keeps alive meanwhile
    _splits: dict[tuple[int, torch.device], _Split | None] = field(default_factory=dict)

    def run(
        self, number: int, mlp: Any, original: Callable[[Tensor], Tensor], hidden: Tensor
    ) -> Tensor:
        """Compute a layer's MLP: whole for text, some neurons for visual tokens."""
        split = self._split(number, hidden.device)
        if split is None or number not in self.neurons:
            return original(hidden)
        rows = hidden.flatten(0, 1)
        some = run_neurons(mlp, rows[split.visual][None], self.neurons[number])[0]
        if split.other.numel():
            some = torch.cat([some, original(rows[split.other][None])[0]])
        return some[split.back].view_as(hidden)

    def _split(self, number: int, device: torch.device) -> _Split | None:
        """Where the visual rows of a layer are; None where it has none."""
        state = self.state
        rows = state.rows_at(number).to(device)
        key = id(rows), device
        if key not in self._splits:
            marks = torch.zeros(rows.index.shape[0], rows.length, dtype=torch.bool)
            for image in state.images:
                shown = slice(None) if image.shown is None else image.shown
                marks[image.sample, image.positions[shown]] = True
            # text stays, so what else there is can be counted on the host
            visual = sum(rows.counts) - sum(state.rows[0][1].counts) + int(marks.sum())
            here = sent(marks, device).gather(1, rows.index)
            valid = state.valid_rows(rows)
            here = here if valid is None else here & valid
            order = here.flatten().logical_not().long().argsort(stable=True)
            split = _Split(order[:visual], order[visual:], order.argsort())
            self._splits[key] = split if visual else None
        return self._splits[key]
