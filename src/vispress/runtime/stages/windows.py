"""Let visual tokens see, of visual tokens, a window: `LayerCompute.window` of a `Stage.COMPUTE`.

All rows stay, and what is computed is masked: it takes as long as the whole. Text sees what it saw,
and so does what is decoded later.
"""

from dataclasses import dataclass
from typing import final

from torch import Tensor
from transformers.cache_utils import Cache

from vispress.errors import ConfigError, UnsupportedModelError
from vispress.methods.base import Compressor
from vispress.runtime.forward.attention_reads import attention_layers
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.forward.visual_windows import VisualWindows, Window
from vispress.runtime.stages.base import Binding, RuntimeStage, StageCall, Watched
from vispress.runtime.tokens import masks
from vispress.types import Stage


def bind(binding: Binding) -> RuntimeStage | None:
    """Make the stage of a chain with a method that has windows.

    Raises:
        ConfigError: Another method reads attention that they change.
    """
    for bound in binding.carried_by(frozenset({Stage.COMPUTE})):
        pruner = bound.method.compute_pruner()
        layers = () if pruner is None else pruner.compute(len(binding.adapter.decoder_layers))
        windows = {
            number: Window(own.window, own.causal)
            for number, own in enumerate(layers)
            if own.window is not None
        }
        if windows:
            step = WindowStep(bound.method, windows)
            step.refuse_reads(binding)
            binding.notes.append(step.note())
            return RuntimeStage(
                carries=frozenset(),
                open=step.open,
                order=43,  # ahead of what adds to the logits of keys, which windows would mirror
                refuse=step.refuse,
                watched_layers=frozenset(windows),
            )
    return None


@final
@dataclass(frozen=True, eq=False)
class WindowStep:
    """A method with windows, on one model.

    Args:
        method: The compressor.
        windows: By decoder layer.
    """

    method: Compressor
    windows: dict[int, Window]

    def note(self) -> str:
        """Say for reports what is seen."""
        sizes = ", ".join(sorted({f"{own.size} x {own.size}" for own in self.windows.values()}))
        return (
            f"{self.method.name}: visual tokens see of visual tokens those in the {sizes} around "
            f"them in decoder layers {min(self.windows)} to {max(self.windows)}; the others are "
            "masked, which saves nothing"
        )

    def refuse_reads(self, binding: Binding) -> None:
        """Refuse methods that read attention where, or behind where, windows change it.

        Raises:
            ConfigError: Names both.
        """
        why = ""
        for bound in binding.placements:
            name, probe = bound.method.name, bound.placement.probe
            if read := sorted(self.windows.keys() & set(attention_layers(bound.placement))):
                why = f"{name} reads the attention of decoder layer {read[0]}"
            elif probe is not None and min(self.windows) < probe:
                why = f"{name} reads decoder layer {probe} in a probe, which has no windows"
        for method in binding.methods:
            if method.cache_evictor() is not None:
                why = f"{method.name} evicts by the attention of decoder layers"
        if why:
            raise ConfigError(
                f"{why}, and {self.method.name} lets visual tokens see a window in layers "
                f"{min(self.windows)} to {max(self.windows)}; set window=None, or leave one of "
                "them out"
            )

    def refuse(self, implementation: str | None, cache: Cache | None) -> None:
        """Refuse attention without a dense mask.

        Raises:
            UnsupportedModelError: It is FlashAttention.
        """
        if masks.check_implementation(implementation) == "flash":
            raise UnsupportedModelError(
                f"{self.method.name} lets visual tokens see a window of visual tokens, which needs "
                f"a dense mask, and {implementation!r} takes none; use 'sdpa' or 'eager', or set "
                "window=None"
            )

    def open(self, state: ForwardState) -> StageCall | None:
        """Begin a call that brings images.

        Raises:
            ConfigError: A KV cache holds what came before.
        """
        if not state.images:
            return None
        if state.past:
            raise ConfigError(
                f"{self.method.name}: the KV cache holds {state.past} tokens, of which it is not "
                "known whether they are visual, and windows leave these out; give the whole "
                "conversation in one call, or set window=None"
            )
        return StageCall(attend=_Seeing(self, VisualWindows(state, self.method.name)).attend)


@dataclass(frozen=True, eq=False)
class _Seeing:
    """What visual tokens see in one call."""

    step: WindowStep
    windows: VisualWindows

    def attend(self, number: int, watched: Watched) -> Tensor | None:
        """Give the mask of a layer with what its visual rows see."""
        window = self.step.windows.get(number)
        if window is None or self.windows.state.mode != "run":
            return watched.mask
        return self.windows.narrow(number, watched.query, watched.key, watched.mask, window)
