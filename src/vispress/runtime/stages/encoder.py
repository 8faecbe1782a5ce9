"""Merge tokens in the layers of the vision encoder, between attention and MLP: `Stage.ENCODER`.

A layer computes `out = h + mlp(norm(h))` with h behind its attention. To merge h between the two,
the norm gets the merged h, the MLP's output goes to all members of a group again, and `out` is
merged. Merging is linear with weights that sum to 1, so this is the MLP of the merged h added to
the merged h, whatever else a layer does to the MLP's output (layer scale, dropout).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, final

from torch import Tensor, nn

from vispress.adapters.base import Modality, ModelAdapter
from vispress.errors import CompressionStateError, ConfigError, UnsupportedMethodError
from vispress.methods.base import Compressor
from vispress.runtime.encoder.merging import EncoderMerge, EncoderStep, check_attention
from vispress.runtime.encoder.pooling import EncoderPool
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.hooks.attention import current_merge, implementation_of, merging, watch
from vispress.runtime.hooks.no_checkpointing import NoCheckpointing
from vispress.runtime.stages.base import Binding, RuntimeStage, StageCall
from vispress.types import ATTENTION_SIGNALS, Signal, Stage
from vispress_kernels import Backend

CARRIES = frozenset({Stage.ENCODER})


def bind(binding: Binding) -> RuntimeStage | None:
    """Make the stage of a chain with a method that merges in the encoder.

    Raises:
        ConfigError: It is not the first of the chain.
        UnsupportedMethodError: The model cannot merge inside its encoder, or another method of the
            chain reads there.
    """
    step = find_encoder_step(binding.methods, binding.adapter)
    if step is None:
        return None
    merging = Merging(binding.adapter, step, binding.backend)
    return RuntimeStage(
        carries=CARRIES,
        open=merging.open,
        order=0,
        install=merging.install,
        encode=merging.call,
    )


def install(adapter: ModelAdapter) -> list[Callable[[], None]]:
    """Put hooks on the encoder for what merges in its layers; returns what undoes them."""
    undo = hook_layers(adapter)
    for block in adapter.encoder_blocks():
        undo.append(watch(block.attention))
        undo.append(block.norm.register_forward_pre_hook(_norm_starts).remove)
        undo.append(block.mlp.register_forward_hook(_mlp_ran).remove)
    return undo


def hook_layers(adapter: ModelAdapter) -> list[Callable[[], None]]:
    """Let the state of an encoder call see what enters and leaves layers; returns the undo."""
    undo: list[Callable[[], None]] = []
    for number, block in enumerate(adapter.encoder_blocks()):
        enter = partial(_layer_starts, number)
        undo.append(block.layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
        # ahead of transformers' hooks that keep hidden states
        undo.append(block.layer.register_forward_hook(_layer_ran, prepend=True).remove)
    for tap in adapter.encoder_taps():
        undo.append(tap.register_forward_pre_hook(_tap_starts).remove)
    return undo


@contextmanager
def held(
    state: EncoderMerge | EncoderPool,
    adapter: ModelAdapter,
    no_checkpointing: NoCheckpointing,
    method: str,
) -> Iterator[None]:
    """Hold the state of one encoder call, which the hooks see inside the block.

    Args:
        state: Of the call.
        adapter: The family.
        no_checkpointing: Of the stage.
        method: Its name.

    Raises:
        CompressionStateError: The hooks did not run.
    """
    with merging(state), no_checkpointing([block.layer for block in adapter.encoder_blocks()]):
        yield
    if state.layer < 0:
        raise CompressionStateError(
            "the vision encoder's layers ran without their hooks (it is compiled), so nothing was "
            "merged or pooled in it: compile model.model.language_model alone, or leave "
            f"{method} out"
        )


@final
class Merging:
    """Make the state of each encoder call.

    Args:
        adapter: The family.
        step: The placement.
        backend: Kernels to use.
    """

    def __init__(self, adapter: ModelAdapter, step: EncoderStep, backend: Backend) -> None:
        self._adapter, self._step, self._backend = adapter, step, backend
        self._no_checkpointing = NoCheckpointing()

    def open(self, state: ForwardState) -> StageCall | None:
        """Do nothing in the language model."""
        return None

    def install(self) -> Sequence[Callable[[], None]]:
        """Put hooks on the encoder; gives what undoes them."""
        return install(self._adapter)

    @contextmanager
    def call(self, modality: Modality, arguments: Mapping[str, Any]) -> Iterator[EncoderMerge]:
        """Hold the state of one encoder call (see `held`)."""
        merge = EncoderMerge(self._adapter, self._step, modality, arguments, self._backend)
        with held(merge, self._adapter, self._no_checkpointing, self._step.method.name):
            yield merge


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


def find_encoder_step(methods: Sequence[Compressor], adapter: ModelAdapter) -> EncoderStep | None:
    """The placement in the encoder of a chain of methods.

    Raises:
        ConfigError: It is not the first of the chain.
        UnsupportedMethodError: The model cannot merge inside its encoder, or another method of the
            chain reads there.
    """
    layers, found = len(adapter.decoder_layers), None
    for method in methods:
        inside = [p for p in method.placements(layers) if p.stage is Stage.ENCODER]
        if not inside:
            continue
        merger = method.encoder_merger()
        if not method.changes_encoder() or len(inside) > 1:
            raise UnsupportedMethodError(
                f"{method.name}: a placement inside the encoder needs an EncoderMerger or an "
                "EncoderPooler, and there can be one"
            )
        if merger is None:
            continue
        check_alone(method, methods)
        found = EncoderStep(method, merger, inside[0].budget)
    if found is not None:
        _check_model(found.method, adapter)
    return found


def _check_model(method: Compressor, adapter: ModelAdapter) -> None:
    blocks = adapter.encoder_blocks()
    if not blocks:
        raise UnsupportedMethodError(
            f"{method.name} merges between attention and MLP of each encoder layer, and the layers "
            f"of this {adapter.family} model's vision encoder are not built that way; CLIP, "
            "SigLIP, InternViT and Qwen-VL encoders are"
        )
    check_attention(implementation_of(blocks[0].attention))


def check_alone(method: Compressor, methods: Sequence[Compressor]) -> None:
    """Check that what changes the encoder comes first, and that nothing else looks into it.

    Args:
        method: What changes it.
        methods: Its chain.

    Raises:
        ConfigError: It is not the first of the chain.
        UnsupportedMethodError: Another method reads there.
    """
    if method is not methods[0]:
        raise ConfigError(
            f"{method.name} merges inside the encoder, but {methods[0].name} before it in the "
            "chain acts behind it; order the chain by layer"
        )
    for other in methods:
        reads = other.signals() & (ATTENTION_SIGNALS | {Signal.VISION_KEYS})
        if reads:
            names = ", ".join(sorted(signal.value for signal in reads))
            raise UnsupportedMethodError(
                f"{other.name} reads {names} of the vision encoder's own tokens, which "
                f"{method.name} merges there; behind it use a method that reads features "
                "(divprune) or the LLM's attention (fastv)"
            )
