"""Where the time of one `generate` goes: encoder, prefill, first token, each later token."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vispress.adapters.base import find_adapter
from vispress.runtime.hooks.instance_patch import patch_instance


class Timer:
    """Marks in time; on a GPU they are events on its stream, so that no mark waits for the device.

    Args:
        device: Where the work is done.
        now: Seconds, for work on the host.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self.device = device
        self._now = now

    def mark(self) -> Any:
        """Mark this moment, in the order of the device's work."""
        if self.device.type != "cuda":
            return self._now()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, first: Any, last: Any) -> float:
        """Measure milliseconds from one mark to another; waits for the last."""
        if self.device.type != "cuda":
            return float(1e3 * (last - first))
        last.synchronize()
        return float(first.elapsed_time(last))

    def synchronize(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One timed `generate` of a batch, in milliseconds.

    Args:
        encoder_ms: Vision encoder and projector, what compression reads there included.
        prefill_ms: From the moment the language model is called, its input embedded, to the first
            token; what compression does before and between decoder layers included.
        ttft_ms: From the call with pixel values to the first token.
        decode_ms: From the first token to the last, per token; None where there is only one.
    """

    encoder_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms: float | None


class Marks:
    """Marks of one `generate`; also its stopping criterion, called once a token, which never stops.

    Args:
        timer: Makes the marks.
    """

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._depth = 0
        self.start: Any = None
        self.encoder: list[tuple[Any, Any]] = []
        self.prefill: Any = None
        self.tokens: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens.append(self._timer.mark())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def features(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for `get_image_features` (which Qwen's video method calls too)."""
        if self._depth:
            return original(*args, **kwargs)
        self._depth += 1
        first = self._timer.mark()
        try:
            return original(*args, **kwargs)
        finally:
            self._depth -= 1
            self.encoder.append((first, self._timer.mark()))

    def enter(self, *_: Any) -> None:
        """Mark the prefill: a pre-hook of the language model, whose first call it is."""
        if self.prefill is None:
            self.prefill = self._timer.mark()

    def sample(self) -> Sample:
        """Compute the times between the marks."""
        between, first, later = self._timer.between, self.tokens[0], self.tokens[1:]
        return Sample(
            encoder_ms=sum(between(a, b) for a, b in self.encoder),
            prefill_ms=between(self.prefill, first),
            ttft_ms=between(self.start, first),
            decode_ms=between(first, later[-1]) / len(later) if later else None,
        )


@contextmanager
def marked(model: Any, timer: Timer) -> Iterator[Marks]:
    """Put marks around the parts of a model, compressed or not; leaves nothing behind."""
    adapter, marks = find_adapter(model), Marks(timer)
    undo: list[Callable[[], None]] = []
    for modality in adapter.placeholders():
        if hasattr(adapter.base, name := f"get_{modality}_features"):
            undo.append(patch_instance(adapter.base, name, marks.features))
    # first of all pre-hooks: what compression does when the language model is called is prefill
    handle = adapter.language_model.register_forward_pre_hook(marks.enter, prepend=True)
    undo.append(handle.remove)
    try:
        yield marks
    finally:
        while undo:
            undo.pop()()


@torch.inference_mode()
def timed_generate(model: Any, inputs: Any, decode_tokens: int, timer: Timer) -> Sample:
    """Greedily generate `1 + decode_tokens` tokens of a batch, timed.

    Args:
        model: A supported model, compressed or not.
        inputs: Keyword arguments of `generate`, on the model's device.
        decode_tokens: Tokens after the first, at least 0.
        timer: For the model's device.
    """
    from transformers import StoppingCriteriaList

    count = 1 + decode_tokens
    with marked(model, timer) as marks:
        criteria = StoppingCriteriaList([marks])
        timer.synchronize()
        marks.start = timer.mark()
        model.generate(
            **inputs,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            stopping_criteria=criteria,
        )
    timer.synchronize()
    return marks.sample()
