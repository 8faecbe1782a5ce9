"""Pool windows between the layers of the vision encoder: `Stage.ENCODER` of an `EncoderPooler`.

Layers run as they are, on shorter sequences; nothing is added to their attention, so any kind of it
works.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, final

from torch import Tensor, nn

from vispress.adapters.base import Modality, ModelAdapter
from vispress.errors import CompressionStateError, UnsupportedMethodError
from vispress.runtime.encoder.pooling import EncoderPool, PoolingStep, check_grids
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.hooks.attention import current_merge, merging
from vispress.runtime.hooks.no_checkpointing import NoCheckpointing
from vispress.runtime.stages.base import Binding, RuntimeStage, StageCall
from vispress.runtime.stages.encoder import check_alone
from vispress.types import Stage

CARRIES = frozenset({Stage.ENCODER})


def bind(binding: Binding) -> RuntimeStage | None:
    """Make the stage of a chain with a method that pools between the encoder's layers.

    Raises:
        ConfigError: It is not the first of the chain, or the encoder has fewer layers.
        UnsupportedMethodError: The encoder's patches are no grid that can be halved as often, or
            another method of the chain reads there.
    """
    methods, adapter = binding.methods, binding.adapter
    found = next((one for one in methods if one.encoder_pooler() is not None), None)
    if found is None:
        return None
    check_alone(found, methods)
    pooler, blocks = found.encoder_pooler(), adapter.encoder_blocks()
    assert pooler is not None
    if not blocks:
        raise UnsupportedMethodError(
            f"{found.name} pools between the layers of the vision encoder, and those of this "
            f"{adapter.family} model are of an unknown kind; CLIP's and SigLIP's can be pooled"
        )
    step = PoolingStep(found, pooler, pooler.pooled_behind(len(blocks)))
    check_grids(step, adapter.family, adapter.encoder_grids("image", {}))
    pooling = Pooling(adapter, step)
    return RuntimeStage(
        carries=CARRIES, open=pooling.open, order=1, install=pooling.install, encode=pooling.call
    )


@final
class Pooling:
    """Make the state of each encoder call.

    Args:
        adapter: The family.
        step: The placement.
    """

    def __init__(self, adapter: ModelAdapter, step: PoolingStep) -> None:
        self._adapter, self._step = adapter, step
        self._no_checkpointing = NoCheckpointing()

    def open(self, state: ForwardState) -> StageCall | None:
        """Do nothing in the language model."""
        return None

    def install(self) -> Sequence[Callable[[], None]]:
        """Put hooks on the encoder; gives what undoes them."""
        undo: list[Callable[[], None]] = []
        for number, block in enumerate(self._adapter.encoder_blocks()):
            enter = partial(_layer_starts, number)
            undo.append(block.layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            # ahead of transformers' hooks that keep hidden states
            undo.append(block.layer.register_forward_hook(_layer_ran, prepend=True).remove)
        for tap in self._adapter.encoder_taps():
            undo.append(tap.register_forward_pre_hook(_tap_starts).remove)
        return undo

    @contextmanager
    def call(self, modality: Modality, arguments: Mapping[str, Any]) -> Iterator[EncoderPool]:
        """Hold the state of one encoder call, which the hooks see inside the block.

        Raises:
            CompressionStateError: The hooks did not run.
        """
        layers = [block.layer for block in self._adapter.encoder_blocks()]
        pool = EncoderPool(self._adapter, self._step, modality, arguments)
        with merging(pool), self._no_checkpointing(layers):
            yield pool
        if pool.layer < 0:
            raise CompressionStateError(
                "the vision encoder's layers ran without their hooks (it is compiled), so nothing "
                "was pooled in it: compile model.model.language_model alone, or leave "
                f"{self._step.method.name} out"
            )


def _layer_starts(number: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
    pool = current_merge()
    return None if pool is None else pool.enter(number, args, kwargs)


def _layer_ran(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    pool = current_merge()
    return None if pool is None else pool.leave(output)


def _tap_starts(module: nn.Module, args: Any) -> Any:
    pool = current_merge()
    return None if pool is None or pool.done else (pool.restore(args[0]), *args[1:])
