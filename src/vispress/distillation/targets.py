"""What a model itself attends to, as a target for networks that rank visual tokens before it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from vispress.api import compress_model, remove_compression
from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.tasks.task import Prompt
from vispress.budget import Budget
from vispress.errors import ConfigError
from vispress.methods._parts.scoring.question import question
from vispress.methods.base import Compressor, upcast
from vispress.types import Placement, Queries, Signal, Stage, TokenPlan, VisualTokens, full_index


@dataclass(frozen=True, eq=False)
class Heard:
    """One image and what was asked about it, on the host.

    Args:
        features: `[N, D]`, its tokens at the LLM's input, in the model's dtype.
        text: `[T, D]`, input embeddings of the question, T > 0.
        target: `[N]` fp32, share of the model's attention that each token has; they add up to 1.
    """

    features: Float[Tensor, "N D"]
    text: Float[Tensor, "T D"]
    target: Float[Tensor, "N"]


@dataclass(eq=False)
class Notes:
    """What placements of one forward noted, bucket by bucket, in order."""

    shown: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Features and text, from the first placement."""
    attention: dict[int, list[Tensor]] = field(default_factory=dict)
    """`[B, N]` by decoder layer."""


def listening(before: Iterable[int], read: Iterable[int]) -> tuple[Placement, ...]:
    """Place a method that keeps everything in front of layers, and behind those that it reads.

    Args:
        before: Decoder layers, from 1 on.
        read: Decoder layers whose attention is read by the words behind an image; none is the last.
    """
    behind = {layer + 1 for layer in read}
    return tuple(
        Placement(
            stage=Stage.IN_LLM,
            budget=Budget(keep_ratio=1.0),
            layer=layer,
            queries=Queries.TEXT_AFTER if layer in behind else None,
            adaptive=True,
        )
        for layer in sorted({*before, *behind})
    )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Listener(Compressor):
    """Looks at attention of some decoder layers, and keeps everything.

    Args:
        read: Decoder layers, ascending; none is the last.
        notes: What is seen.
    """

    name: ClassVar[str] = "attention_targets"
    summary: ClassVar[str] = "everything"
    paper: ClassVar[str] = "none"
    takes_budget: ClassVar[bool] = False
    reads: ClassVar[frozenset[Signal]] = frozenset(
        {Signal.INPUT_EMBEDDINGS, Signal.TEXT_EMBEDDINGS, Signal.QUERY_ATTENTION, Signal.DEPTH}
    )

    read: tuple[int, ...]
    notes: Notes

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return listening((), self.read)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.query_attention is not None  # declared in `reads`
        assert tokens.input_embeddings is not None
        assert tokens.depth is not None
        layer = tokens.depth[0] - 1
        if layer == self.read[0]:
            self.notes.shown.append((tokens.input_embeddings.cpu(), question(tokens).cpu()))
        rows = upcast(tokens.query_attention).mean(dim=1)  # [B, Q, N]
        mean = _shares(rows.mean(dim=1)) if rows.shape[1] else rows.sum(dim=1)
        if layer == self.read[0] and rows.shape[1]:  # where the answer begins, in one layer
            mean = (mean + _shares(rows[:, -1])) / 2
        self.notes.attention.setdefault(layer, []).append(mean.cpu())
        device = tokens.features.device
        return TokenPlan(keep=full_index(tokens.batch, tokens.num_visual, device))


def layers_to_read(num_layers: int) -> tuple[int, ...]:
    """Choose a decoder layer a third down and one two thirds down: before, words find words.

    Raises:
        ConfigError: The model has fewer than two layers.
    """
    if num_layers < 2:
        raise ConfigError(f"attention is read below the last layer; the model has {num_layers}")
    first, second = num_layers // 3, min(2 * num_layers // 3, num_layers - 2)
    return (first, second) if first < second else (first,)


def listen(
    loaded: LoadedModel,
    prompts: Iterable[Prompt],
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> Iterator[Heard]:
    """Show prompts to a model, and give each image with what the words behind it attended to.

    The target is the mean over heads and over the words behind the image of two layers' attention,
    a third and two thirds down, with what the last word attends to in the first of them; each
    scaled to 1 over the image. Images without words behind them are left out.

    Args:
        loaded: The model, uncompressed; it stays as it is.
        prompts: With pictures; read batch by batch.
        batch_size: Prompts of a batch.
        advance: Told how many prompts were shown.

    Raises:
        CompressionStateError: The model is compressed.
    """
    from vispress.adapters.base import find_adapter

    read = layers_to_read(len(find_adapter(loaded.model).decoder_layers))
    listener = Listener(read=read, notes=(notes := Notes()))
    for _ in show(loaded, prompts, listener, batch_size=batch_size, advance=advance):
        yield from _images(notes)
        notes.shown.clear()
        notes.attention.clear()


def show(
    loaded: LoadedModel,
    prompts: Iterable[Prompt],
    listener: Compressor,
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> Iterator[int]:
    """Show prompts to a model under a method that notes what it sees, batch by batch.

    Args:
        loaded: The model, uncompressed; it stays as it is.
        prompts: With pictures; read batch by batch.
        listener: Notes, and keeps everything.
        batch_size: Prompts of a batch.
        advance: Told how many prompts were shown.

    Yields:
        How many prompts a batch had, behind it.

    Raises:
        CompressionStateError: The model is compressed.
    """
    left = iter(prompts)
    while batch := list(islice(left, batch_size)):
        compress_model(loaded.model, listener)
        try:
            with torch.no_grad():
                loaded.model(**loaded.encode(batch), use_cache=False)
        finally:
            remove_compression(loaded.model)
        yield len(batch)
        if advance is not None:
            advance(len(batch))


def _images(notes: Notes) -> Iterator[Heard]:
    for (features, text), *attention in zip(notes.shown, *notes.attention.values(), strict=True):
        target = torch.stack(attention).mean(dim=0)
        for row in range(len(features)):
            if text.shape[1] and float(target[row].sum()) > 0:
                yield Heard(features[row].clone(), text[row].clone(), _shares(target[row]))


def _shares(attention: Float[Tensor, "*B N"]) -> Float[Tensor, "*B N"]:
    total = attention.sum(dim=-1, keepdim=True)
    return attention / total.clamp(min=torch.finfo(attention.dtype).tiny)
