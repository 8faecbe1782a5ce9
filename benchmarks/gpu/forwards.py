"""One model timed three ways in turns: untouched, compressed, and on a text of the kept length."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.gpu import shapes
from benchmarks.gpu.budgets import published
from benchmarks.gpu.record import Row, quantiles
from benchmarks.gpu.timing import Stopwatch, synchronize
from vispress import compress_model, compression_report, remove_compression
from vispress.adapters.base import find_adapter

NEW_TOKENS = 8
Spreads = dict[str, dict[str, float]]


class _Marks(StoppingCriteria):  # type: ignore[misc]
    """A mark behind every generated token."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self.marks: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.marks.append(self._watch.mark())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Bench:
    """A random-weight model and the marks of its forwards.

    Args:
        shape: Of the model.
        device: Where it is built.
        dtype: Of its weights.
    """

    def __init__(self, shape: shapes.Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.model = shapes.build(shape, device, dtype)
        adapter = find_adapter(self.model)
        self.has_cls = adapter.has_cls
        self._watch = Stopwatch(device)
        self._entered: Any = None
        # the first pre-hook: what compression adds to the language model's call comes behind it
        adapter.language_model.register_forward_pre_hook(self._enter)

    def _enter(self, *_: Any) -> None:
        self._entered = self._watch.mark()

    def measure(self, method: str, batch: int, repeats: int, limit_s: float = 1.2) -> Row:
        """Times, ratios, cache and memory of one method at its published budget."""
        options = published(method, self.shape.visual, has_cls=self.has_cls)
        inputs = shapes.prompt(self.shape, batch, self.device, self.dtype)
        facts = self._facts(inputs, options)
        length = facts["just_that_length"]
        plain = shapes.text_prompt(self.shape, length, batch, self.device)
        variants = {"uncompressed": inputs, "compressed": inputs, "text": plain}
        memory = self._memory(variants, options)
        start = time.perf_counter()
        self._round(variants, options)
        rounds = int(limit_s / max(time.perf_counter() - start, 1e-6))
        times = self._times(variants, options, max(3, min(repeats, rounds)))
        steps = self._decode(variants, options)
        shown = {k: v for k, v in options.items() if k != "method"}
        return (
            {"model": self.shape.name, "method": method, "batch": batch, "options": shown}
            | {"dtype": str(self.dtype).removeprefix("torch."), "attention": "sdpa"}
            | facts
            | {"peak_extra_bytes": memory, "decode_ms_per_token": steps, **times}
            | _ratios(times)
        )

    @contextmanager
    def _as(self, variant: str, options: Mapping[str, Any]) -> Iterator[None]:
        if variant != "compressed":
            yield
            return
        compress_model(self.model, **options)
        try:
            yield
        finally:
            remove_compression(self.model)

    @torch.inference_mode()
    def _prefill(self, inputs: Mapping[str, Any]) -> Any:
        return self.model(**inputs, use_cache=True, logits_to_keep=1)

    def _facts(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Lengths and cache bytes, both ways."""
        layers = self._prefill(inputs).past_key_values.layers
        tensors = (x for layer in layers for x in (layer.keys, layer.values))
        whole = sum(x.numel() * x.element_size() for x in tensors)
        with self._as("compressed", options):
            self._prefill(inputs)
            report = compression_report(self.model)
        length, visual = inputs["input_ids"].shape[1], self.shape.visual
        kept = round(report.mean_keep_ratio * visual)
        return {
            "sequence": length,
            "visual_tokens": visual,
            "kept_at_last_layer": next(i.num_kept for s in report.samples for i in s.images),
            "mean_keep_ratio": report.mean_keep_ratio,
            "just_that_length": length - visual + kept,
            "kv_bytes": report.kv_bytes,
            "uncompressed_kv_bytes": whole,
            "notes": list(report.notes),
        }

    def _memory(self, variants: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, int]:
        """Peak bytes of a prefill beyond weights and inputs (nothing on a CPU)."""
        found = {}
        for name, inputs in variants.items():
            if self.device.type != "cuda":
                break
            with self._as(name, options):
                synchronize(self.device)
                before = torch.cuda.memory_allocated(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
                self._prefill(inputs)
                found[name] = torch.cuda.max_memory_allocated(self.device) - before
        return found

    def _round(
        self, variants: Mapping[str, Any], options: Mapping[str, Any]
    ) -> dict[str, tuple[float, float]]:
        """`(TTFT, prefill)` of each variant, once; the prefill starts where the encoder ends."""
        found = {}
        for name, inputs in variants.items():
            with self._as(name, options):
                synchronize(self.device)
                start = self._watch.mark()
                self._prefill(inputs)
                end = self._watch.mark()
                whole = self._watch.between(start, end)
                found[name] = (whole, self._watch.between(self._entered, end))
        return found

    def _times(
        self, variants: Mapping[str, Any], options: Mapping[str, Any], rounds: int
    ) -> dict[str, Spreads]:
        done = [self._round(variants, options) for _ in range(rounds)]
        return {
            "ttft_ms": {name: quantiles([r[name][0] for r in done]) for name in variants},
            "prefill_ms": {name: quantiles([r[name][1] for r in done]) for name in variants},
        }

    def _decode(self, variants: Mapping[str, Any], options: Mapping[str, Any]) -> Spreads:
        """Milliseconds between generated tokens, the first step (warm-up) left out."""
        found = {}
        for name, inputs in variants.items():
            with self._as(name, options):
                marks = _Marks(self._watch)
                self.model.generate(
                    **inputs,
                    max_new_tokens=NEW_TOKENS,
                    min_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    stopping_criteria=StoppingCriteriaList([marks]),
                )
            synchronize(self.device)
            steps = zip(marks.marks[1:-1], marks.marks[2:], strict=True)
            found[name] = quantiles([self._watch.between(a, b) for a, b in steps])
        return found


def _ratios(times: Mapping[str, Spreads]) -> dict[str, float]:
    """What the targets speak of, from the medians.

    `overhead_share` is what choosing costs over the uncompressed prefill: the prefill beyond that
    of a text of the kept length, and what the encoder takes longer.
    """
    ttft = {name: spread["median"] for name, spread in times["ttft_ms"].items()}
    prefill = {name: spread["median"] for name, spread in times["prefill_ms"].items()}
    encoder = {name: ttft[name] - prefill[name] for name in ("uncompressed", "compressed")}
    extra = prefill["compressed"] - prefill["text"]
    extra += encoder["compressed"] - encoder["uncompressed"]
    return {
        "prefill_speedup": prefill["uncompressed"] / prefill["compressed"],
        "speedup_of_just_that_length": prefill["uncompressed"] / prefill["text"],
        "share_of_just_that_length": prefill["text"] / prefill["compressed"],
        "ttft_speedup": ttft["uncompressed"] / ttft["compressed"],
        "overhead_share": extra / prefill["uncompressed"],
    }
