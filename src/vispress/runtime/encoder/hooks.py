"""Hooks that let the layers of a vision encoder merge tokens between attention and MLP.

A layer computes `out = h + mlp(norm(h))` with h behind its attention. To merge h between the two,
the norm gets the merged h, the MLP's output goes to all members of a group again, and `out` is
merged. Merging is linear with weights that sum to 1, so this is the MLP of the merged h added to
the merged h, whatever else a layer does to the MLP's output (layer scale, dropout).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from vispress.adapters.base import Modality, ModelAdapter
from vispress.errors import CompressionStateError
from vispress.runtime.encoder.merging import EncoderMerge
from vispress.runtime.hooks.attention import current_merge, merging, watch
from vispress.runtime.hooks.no_checkpointing import NoCheckpointing
from vispress.runtime.stages.encoder import EncoderStep
from vispress_kernels import Backend


def install(adapter: ModelAdapter) -> list[Callable[[], None]]:
    """Hooks on the encoder's layers; returns what undoes them."""
    undo: list[Callable[[], None]] = []
    for number, block in enumerate(adapter.encoder_blocks()):
        undo.append(watch(block.attention))
        layer, norm, mlp = block.layer, block.norm, block.mlp
        enter = partial(_layer_starts, number)
        undo.append(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
        undo.append(norm.register_forward_pre_hook(_norm_starts).remove)
        undo.append(mlp.register_forward_hook(_mlp_ran).remove)
        # ahead of transformers' hooks that keep hidden states
        undo.append(layer.register_forward_hook(_layer_ran, prepend=True).remove)
    for tap in adapter.encoder_taps():
        undo.append(tap.register_forward_pre_hook(_tap_starts).remove)
    return undo


class Merging:
    """The encoder's side of an attachment: makes the state of each call.

    Args:
        adapter: The family.
        step: The placement, or None.
        backend: Kernels to use.
    """

    def __init__(self, adapter: ModelAdapter, step: EncoderStep | None, backend: Backend) -> None:
        self._adapter, self._step, self._backend = adapter, step, backend
        self._pause = NoCheckpointing()

    def install(self) -> list[Callable[[], None]]:
        """Hooks on the encoder, if something merges there; returns what undoes them."""
        return [] if self._step is None else install(self._adapter)

    @contextmanager
    def call(
        self, modality: Modality, arguments: Mapping[str, Any]
    ) -> Iterator[EncoderMerge | None]:
        """The state of one encoder call, which the hooks see inside the block.

        Raises:
            CompressionStateError: The hooks did not run.
        """
        if self._step is None:
            yield None
            return
        layers = [block.layer for block in self._adapter.encoder_blocks()]
        merge = EncoderMerge(self._adapter, self._step, modality, arguments, self._backend)
        with merging(merge), self._pause(layers):
            yield merge
        if merge.layer < 0:
            raise CompressionStateError(
                "the vision encoder's layers ran without their hooks (it is compiled), so nothing "
                "was merged in it: compile model.model.language_model alone, or leave the method "
                "that merges in the encoder out"
            )


def _layer_starts(number: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
    merge = current_merge()
    return None if merge is None else merge.enter(number, args, kwargs)


def _norm_starts(module: nn.Module, args: Any) -> Any:
    merge = current_merge()
    if merge is None or not merge.merges_here:
        return None
    merge.decide()
    return (merge.merge(args[0]), *args[1:])


def _mlp_ran(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    merge = current_merge()
    return None if merge is None or not merge.merges_here else merge.expand(output)


def _layer_ran(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    merge = current_merge()
    return None if merge is None else merge.leave(output)


def _tap_starts(module: nn.Module, args: Any) -> Any:
    merge = current_merge()
    return None if merge is None or merge.done else (merge.restore(args[0]), *args[1:])
