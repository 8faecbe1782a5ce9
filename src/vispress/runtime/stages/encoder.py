"""The placement in the vision encoder, if a chain has one, and whether the model can take it."""

from collections.abc import Sequence
from dataclasses import dataclass

from vispress.adapters.base import ModelAdapter
from vispress.budget import Budget
from vispress.errors import ConfigError, UnsupportedMethodError
from vispress.methods.base import Compressor
from vispress.methods.encoder_merger import EncoderMerger
from vispress.types import ATTENTION_SIGNALS, Signal, Stage

IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention that takes numbers to add to its logits."""


@dataclass(frozen=True, eq=False)
class EncoderStep:
    """A placement in the encoder.

    Args:
        method: The compressor.
        merger: What it does there.
        budget: Tokens of an image that should be left at the encoder's end.
    """

    method: Compressor
    merger: EncoderMerger
    budget: Budget


def find_encoder_step(methods: Sequence[Compressor], adapter: ModelAdapter) -> EncoderStep | None:
    """The placement in the encoder of a chain of methods.

    Raises:
        ConfigError: It is not the first of the chain.
        UnsupportedMethodError: The model cannot merge inside its encoder, or another method of the
            chain reads there.
    """
    layers, found = len(adapter.decoder_layers), None
    for number, method in enumerate(methods):
        inside = [p for p in method.placements(layers) if p.stage is Stage.ENCODER]
        if not inside:
            continue
        merger = method.encoder_merger()
        if merger is None or len(inside) > 1:
            raise UnsupportedMethodError(
                f"{method.name}: a placement inside the encoder needs an EncoderMerger, and there "
                "can be one"
            )
        if number:
            raise ConfigError(
                f"{method.name} merges inside the encoder, but {methods[0].name} before it in the "
                "chain acts behind it; order the chain by layer"
            )
        found = EncoderStep(method, merger, inside[0].budget)
    if found is not None:
        _check_model(found.method, adapter)
        _check_readers(found.method, methods)
    return found


def _check_model(method: Compressor, adapter: ModelAdapter) -> None:
    blocks = adapter.encoder_blocks()
    if not blocks:
        raise UnsupportedMethodError(
            f"{method.name} merges between attention and MLP of each encoder layer, and the layers "
            f"of this {adapter.family} model's vision encoder are not built that way; CLIP, "
            "SigLIP, InternViT and Qwen-VL encoders are"
        )
    check_attention(str(getattr(blocks[0].attention.config, "_attn_implementation", "eager")))


def check_attention(implementation: str) -> None:
    """Refuse attention that cannot weigh merged tokens.

    Raises:
        UnsupportedMethodError: Names what works.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedMethodError(
            "merged tokens add the log of their size to the attention logits, which "
            f"{implementation!r} in the vision encoder cannot; these can: "
            f"{', '.join(IMPLEMENTATIONS)}. For the encoder alone: "
            "model.set_attn_implementation({'vision_config': 'sdpa'})"
        )


def _check_readers(method: Compressor, methods: Sequence[Compressor]) -> None:
    for other in methods:
        reads = other.signals() & (ATTENTION_SIGNALS | {Signal.VISION_KEYS})
        if reads:
            names = ", ".join(sorted(signal.value for signal in reads))
            raise UnsupportedMethodError(
                f"{other.name} reads {names} of the vision encoder's own tokens, which "
                f"{method.name} merges there; behind it use a method that reads features "
                "(divprune) or the LLM's attention (fastv)"
            )
