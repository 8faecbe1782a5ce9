"""Questions in batches, each processed once for all cells."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vispress.adapters.base import find_adapter
from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.tasks.task import Prompt
from vispress.runtime.encoder.capture import EncoderSink
from vispress.runtime.hooks.attention import current_sink
from vispress.runtime.hooks.instance_patch import Original, patch_instance

LIMIT = 2 * 2**30
"""Bytes that are kept of processed batches, and as many of encoder output."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some questions of a task.

    Args:
        task: Its name.
        places: Where the questions stand in the task.
        prompts: The questions.
    """

    task: str
    places: tuple[int, ...]
    prompts: tuple[Prompt, ...]


def make_batches(
    loaded: LoadedModel, task: str, prompts: Sequence[Prompt], size: int
) -> list[Batch]:
    """Group all questions of a task; conversations with equally long texts come together.

    Args:
        loaded: Whose tokens are counted.
        task: Name of the task.
        prompts: Its questions.
        size: Of a batch, at most.
    """
    order = list(range(len(prompts)))
    if any(prompt.followups for prompt in prompts):
        # rows of one batch then part only where their answers differ in length
        order.sort(key=lambda place: _lengths(loaded, prompts[place]))
    return [
        Batch(task, tuple(part), tuple(prompts[place] for place in part))
        for part in (order[start : start + size] for start in range(0, len(order), size))
    ]


def _lengths(loaded: LoadedModel, prompt: Prompt) -> list[int]:
    texts = [*(text for text, _ in prompt.followups), prompt.text]
    counts = [len(loaded.processor.tokenizer(text)["input_ids"]) for text in texts]
    return [len(texts), *counts]


class Memory:
    """Batches shared by all cells: processed inputs, and the vision encoder's output for them.

    Both are kept while they fit; a batch that no longer fits is made each time, with equal results.

    Args:
        loaded: The model, uncompressed.
        limit: Bytes to keep of inputs, of features, and of what methods read in the encoder.
    """

    def __init__(self, loaded: LoadedModel, limit: int = LIMIT) -> None:
        self._loaded, self._limit = loaded, limit
        self._inputs, self._features = _Bounded(limit), _Bounded(limit)
        self._asked: Any = None
        self._collected = _Bounded(limit)

    @contextmanager
    def shown(self, batch: Batch, *, anew: bool) -> Iterator[Any]:
        """Enter a batch: inside, what the encoder gave for it before is found again.

        Args:
            batch: The batch.
            anew: The encoder computes something else than for the uncompressed model; it runs.
        """
        inputs = self.inputs(batch, pixels=anew)
        with nullcontext() if anew else self.encoder(batch):
            yield inputs

    def inputs(self, batch: Batch, *, pixels: bool = True) -> Any:
        """Process the batch's first turn; the result is on the model's device, not to be changed.

        Args:
            batch: The batch.
            pixels: Whether pixels are needed outside `encoder`; else they may be zeros.
        """
        if not pixels and batch in self._features.held:
            return self._features.held[batch][0]
        return self._inputs.get(batch, lambda: self._loaded.encode(batch.prompts))

    @contextmanager
    def encoder(self, batch: Batch) -> Iterator[None]:
        """Let the model find the encoder's output of a batch, or note it for the next cell.

        Compression finds what it reads inside the encoder, too, as long as cells ask for the same.
        Not for cells that change what the encoder computes.
        """

        video = any(prompt.videos for prompt in batch.prompts)
        pixels = "pixel_values_videos" if video else "pixel_values"

        def seen(original: Original, *args: Any, **kwargs: Any) -> Any:
            sink = current_sink()
            collecting = sink if isinstance(sink, EncoderSink) and sink.asked else None
            if not self._knows(batch, collecting):
                bound = inspect.signature(original.function).bind_partial(*args, **kwargs)
                bound.arguments[pixels] = self.inputs(batch)[pixels]
                output = _bare(original(*bound.args, **bound.kwargs))
                self._note(batch, output, collecting, pixels)
                return copy.copy(output)
            if collecting is not None:
                collecting.fill(self._collected.held[batch])
            return copy.copy(self._features.held[batch][1])  # compression marks what it gets

        name = "get_video_features" if video else "get_image_features"
        undo = patch_instance(find_adapter(self._loaded.model).base, name, seen)
        try:
            yield
        finally:
            undo()

    def _knows(self, batch: Batch, sink: EncoderSink | None) -> bool:
        """Tell whether the encoder need not run."""
        if batch not in self._features.held or sink is None:
            return batch in self._features.held
        return self._asked == sink.asked and batch in self._collected.held

    def _note(self, batch: Batch, output: Any, sink: EncoderSink | None, pixels: str) -> None:
        inputs = self.inputs(batch)
        # the same, with pixels that take no memory
        inputs = {**inputs, pixels: inputs[pixels].new_zeros(()).expand(inputs[pixels].shape)}
        self._features.put(batch, (inputs, output), _bytes(output))
        if sink is not None:
            if self._asked != sink.asked:
                self._asked, self._collected = sink.asked, _Bounded(self._limit)
            collected = sink.collected()
            self._collected.put(batch, collected, _bytes(collected))


class _Bounded:
    """Values by batch, up to a number of bytes; the first to come stay.

    Every cell asks in the same order: dropping the oldest would drop what comes next.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit
        self.held: dict[Batch, Any] = {}

    def put(self, batch: Batch, value: Any, size: int) -> None:
        if size <= self._left and batch not in self.held:
            self._left -= size
            self.held[batch] = value

    def get(self, batch: Batch, make: Callable[[], Any]) -> Any:
        if batch not in self.held:
            value = make()
            self.put(batch, value, _bytes(value))
            return value
        return self.held[batch]


def _bare(output: Any) -> Any:
    """Drop from the encoder's output what only the encoder itself needs."""
    dropped = ("hidden_states", "attentions", "last_hidden_state")
    return type(output)(**{name: value for name, value in output.items() if name not in dropped})


def _bytes(value: Any) -> int:
    """Count the bytes of all tensors in nested mappings and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, Mapping) else value
    return sum(map(_bytes, parts)) if isinstance(value, Mapping | list | tuple) else 0
