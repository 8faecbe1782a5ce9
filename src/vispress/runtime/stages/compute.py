"""Let decoder layers compute less for visual tokens: `Stage.COMPUTE`.

All rows stay. The MLP of such a layer runs twice: whole on text, and on some of its neurons for
visual tokens. Weights on visual tokens that are zero behind the softmax are values that are zero in
front of it, which any attention takes. A call without images, as a decode step is, is the untouched
model's, and so are the rows of an answer that comes with its prompt, where heads are concerned.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from vispress.adapters.decoder import check_gated_mlp, run_neurons
from vispress.devices import sent
from vispress.errors import ConfigError, UnsupportedModelError
from vispress.methods.base import Compressor
from vispress.methods.compute_pruner import LayerCompute
from vispress.runtime.forward.apply_placement import note_all_kept
from vispress.runtime.forward.attention_reads import attention_layers
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.forward.visual_rows import VisualRows
from vispress.runtime.stages.base import Attend, Binding, RuntimeStage, StageCall
from vispress.types import Stage

CARRIES = frozenset({Stage.COMPUTE})


class Heads(NamedTuple):
    """Heads that visual tokens have no part in, and how many there are."""

    inactive: tuple[int, ...]
    total: int


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
    heads = _heads(binding, method, layers)
    part = ComputePart(method, layers, _neurons(binding, method, layers), heads)
    _refuse_reads(binding, part)
    binding.notes.extend(part.notes())
    return RuntimeStage(
        carries=CARRIES,
        open=part.open,
        order=55,
        watched_layers=frozenset(heads),
        mlp_layers=frozenset(part.neurons),
    )


def _heads(
    binding: Binding, method: Compressor, layers: Sequence[LayerCompute]
) -> dict[int, Heads]:
    """Inactive heads of each layer that has any."""
    config: Any = binding.adapter.language_model.config
    found = {}
    for number, own in enumerate(layers):
        wrong = [head for head in own.inactive_heads if head >= config.num_attention_heads]
        if wrong:
            raise ConfigError(
                f"{method.name}: decoder layer {number} has heads 0 to "
                f"{config.num_attention_heads - 1}, got inactive head {wrong[0]}"
            )
        if own.inactive_heads:
            found[number] = Heads(own.inactive_heads, config.num_attention_heads)
    return found


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


def _refuse_reads(binding: Binding, part: "ComputePart") -> None:
    name, changed = part.method.name, {*part.neurons, *part.heads}
    for bound in binding.placements:
        probe = bound.placement.probe
        if probe is not None and any(number < probe for number in changed):
            raise ConfigError(
                f"{bound.method.name} reads decoder layer {probe} in a probe, which computes all "
                f"that {name} leaves out of the layers before it; leave one of them out"
            )
        for layer in attention_layers(bound.placement):
            if layer in part.heads:
                raise ConfigError(
                    f"{bound.method.name} reads the attention of decoder layer {layer}, where "
                    f"{name} takes weights of some heads to zero behind the softmax; let all "
                    "heads of that layer be active, or leave one of them out"
                )


@final
@dataclass(frozen=True, eq=False)
class ComputePart:
    """A method that computes less for visual tokens, on one model.

    Args:
        method: The compressor.
        layers: What each decoder layer computes.
        neurons: By layer, those that visual tokens go through.
        heads: Of layers in which some are inactive.
    """

    method: Compressor
    layers: Sequence[LayerCompute]
    neurons: dict[int, int]
    heads: dict[int, Heads]

    def notes(self) -> list[str]:
        """Say for reports what is computed."""
        found, name = [], self.method.name
        if self.neurons:
            shares = sorted({f"1/{self.layers[number].ffn_ratio}" for number in self.neurons})
            found.append(
                f"{name}: visual tokens go through the first {', '.join(shares)} of the FFN "
                f"neurons of decoder layers {min(self.neurons)} to {max(self.neurons)}"
            )
        if self.heads:
            inactive = sum(len(own.inactive) for own in self.heads.values())
            found.append(
                f"{name}: visual tokens have no part in {inactive} heads of {len(self.heads)} "
                "decoder layers; these are computed all the same"
            )
        return found

    def open(self, state: ForwardState) -> StageCall | None:
        """Begin a call that brings images.

        Raises:
            ConfigError: Heads are inactive, and a KV cache holds what came before.
        """
        if not state.images:
            return None
        if self.heads and state.past:
            raise ConfigError(
                f"{self.method.name}: the KV cache holds {state.past} tokens, of which it is not "
                "known whether they are visual, and inactive heads leave these out; give the whole "
                "conversation in one call, or set inactive_heads=None"
            )
        call = _Computing(state, self.neurons, self.heads, VisualRows(state))
        return StageCall(
            place=partial(note_all_kept, state),
            attention=call.attend if self.heads else None,
            feed_forward=call.feed_forward if self.neurons else None,
        )


@final
@dataclass(eq=False)
class _Computing:
    """The layers of one call.

    Args:
        state: The call.
        neurons: By layer, those that visual tokens go through.
        heads: Of layers in which some are inactive.
        visual: Which rows are visual.
    """

    state: ForwardState
    neurons: dict[int, int]
    heads: dict[int, Heads]
    visual: VisualRows

    def feed_forward(
        self, number: int, mlp: Any, original: Callable[[Tensor], Tensor], hidden: Tensor
    ) -> Tensor:
        """Compute a layer's MLP: whole for text, some neurons for visual tokens."""
        split = self.visual.split(number, hidden.device)
        if split is None or number not in self.neurons:
            return original(hidden)
        rows = hidden.flatten(0, 1)
        some = run_neurons(mlp, rows[split.visual][None], self.neurons[number])[0]
        if split.other.numel():
            some = torch.cat([some, original(rows[split.other][None])[0]])
        return some[split.back].view_as(hidden)

    def attend(self, number: int, value: Tensor, run: Attend) -> tuple[Tensor, Tensor | None]:
        """Compute a layer's attention without what inactive heads take of visual tokens.

        Raises:
            UnsupportedModelError: Other processes have some of the heads.
        """
        state, heads = self.state, self.heads.get(number)
        if heads is None or state.mode != "run":
            return run(value)
        rows = state.rows_at(number).to(value.device)
        visual = self.visual.of(rows, value.device)
        asks = sent(self.visual.prompt, value.device).gather(1, rows.index)
        inactive = torch.zeros(heads.total, dtype=torch.bool)
        inactive[list(heads.inactive)] = True
        # the chunk is the first in the cache, and a static buffer has room behind it
        keys = torch.nn.functional.pad(visual, (0, value.shape[2] - rows.size))[:, None, :, None]
        groups = inactive.view(value.shape[1], -1) if self._whole(value, heads) else None
        if groups is not None and int(self.visual.prompt.sum()) == sum(state.rows[0][1].counts):
            off = sent(groups[:, 0], value.device)[None, :, None, None]
            output, weights = run(value.masked_fill(keys & off, 0))
            off = sent(inactive, value.device)
        else:
            off = sent(inactive, value.device)
            output, weights = run(value)
            if output.shape[2] != heads.total:
                raise UnsupportedModelError(
                    f"this process has {output.shape[2]} of {heads.total} heads of an attention "
                    "(tensor parallelism), of which some are inactive; set inactive_heads=None"
                )
            without, _ = run(value.masked_fill(keys, 0))
            output = torch.where((asks[..., None] & off)[..., None], without, output)
        output = output.masked_fill((visual[..., None] & off)[..., None], 0)
        if weights is not None:
            left_out = asks[:, None, :, None] & keys[..., 0][:, :, None] & off[None, :, None, None]
            weights = weights.masked_fill(left_out, 0)
        return output, weights

    @staticmethod
    def _whole(value: Tensor, heads: Heads) -> bool:
        """Whether heads that share values are inactive together."""
        if heads.total % value.shape[1]:
            return False
        size = heads.total // value.shape[1]
        counts = [0] * value.shape[1]
        for head in heads.inactive:
            counts[head // size] += 1
        return set(counts) <= {0, size}
