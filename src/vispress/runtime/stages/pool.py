"""Pool windows between the layers of the vision encoder: `Stage.ENCODER` of an `EncoderPooler`.

Layers run as they are, on shorter sequences; nothing is added to their attention, so any kind of it
works.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

from vispress.adapters.base import Modality, ModelAdapter
from vispress.errors import UnsupportedMethodError
from vispress.runtime.encoder.pooling import EncoderPool, PoolingStep, check_grids
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.hooks.no_checkpointing import NoCheckpointing
from vispress.runtime.stages.base import Binding, RuntimeStage, StageCall
from vispress.runtime.stages.encoder import check_alone, held, hook_layers
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
        return hook_layers(self._adapter)

    @contextmanager
    def call(self, modality: Modality, arguments: Mapping[str, Any]) -> Iterator[EncoderPool]:
        """Hold the state of one encoder call (see `held`)."""
        pool = EncoderPool(self._adapter, self._step, modality, arguments)
        with held(pool, self._adapter, self._no_checkpointing, self._step.method.name):
            yield pool
