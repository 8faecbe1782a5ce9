"""One model timed three ways in turns: untouched, compressed, and on a text of the kept length."""

import time
import warnings
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
from vispress.bench.timing.memory import peak_bytes
from vispress.report import CompressionReport

NEW_TOKENS = 6
ROUNDS, LIMIT_S = (5, 12), 0.6
"""Rounds at least and at most; between them, seconds that they may take."""
LAUNCH_BOUND = 0.9
"""A share of the prefill that the host needs to launch it, from which the device waits for it."""
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
        self._entered_s = 0.0
        self._inputs: dict[int, dict[str, Any]] = {}
        # the first pre-hook: what compression adds to the language model's call comes behind it
        adapter.language_model.register_forward_pre_hook(self._enter)

    def _enter(self, *_: Any) -> None:
        self._entered, self._entered_s = self._watch.mark(), time.perf_counter()

    def uncompressed(self, batch: int) -> Row:
        """What every method of the batch is compared with: cache, memory, decode; its own times."""
        inputs = self._prompt(batch)
        self._prefill(inputs)
        out, peak = self._peak(inputs)
        tensors = (x for layer in out.past_key_values.layers for x in (layer.keys, layer.values))
        cache = sum(x.numel() * x.element_size() for x in tensors)
        del out, tensors
        times = self._times({"uncompressed": inputs}, {})
        host, prefill = (times[k]["uncompressed"] for k in ("host_prefill_ms", "prefill_ms"))
        return (
            self._head("uncompressed", batch, inputs)
            | {"uncompressed_kv_bytes": cache, "peak_extra_bytes": {"uncompressed": peak}}
            | {"launch_bound": host["median"] >= LAUNCH_BOUND * prefill["median"]}
            | {"host_waits": self._waits(inputs)}
            | {"decode_ms_per_token": {"uncompressed": self._decode(inputs)}, **times}
        )

    def measure(self, method: str, batch: int, base: Row) -> Row:
        """Times, ratios, cache and memory of one method at its published budget.

        Args:
            method: A registered name.
            batch: Samples.
            base: The row of `uncompressed` for this batch.
        """
        options = published(method, self.shape.visual, has_cls=self.has_cls)
        inputs = self._prompt(batch)
        with self._as("compressed", options):  # what is made once is made here
            peak = self._peak(inputs)[1]
            facts = self._facts(inputs, compression_report(self.model))
            facts["host_waits"] = self._waits(inputs)
        plain = shapes.text_prompt(self.shape, facts["just_that_length"], batch, self.device)
        memory = {"compressed": peak, "text": self._peak(plain)[1]}
        variants = {"uncompressed": inputs, "compressed": inputs, "text": plain}
        self._round(variants, options)
        times = self._times(variants, options)
        with self._as("compressed", options):
            steps = self._decode(inputs)
        shown = {k: v for k, v in options.items() if k != "method"}
        return (
            self._head(method, batch, inputs)
            | {"options": shown, "against": base["name"]}
            | facts
            | {"uncompressed_kv_bytes": base["uncompressed_kv_bytes"]}
            | {"peak_extra_bytes": base["peak_extra_bytes"] | memory}
            | {"decode_ms_per_token": {"compressed": steps}, **times}
            | _ratios(times)
        )

    def _prompt(self, batch: int) -> dict[str, Any]:
        if batch not in self._inputs:
            self._inputs = {batch: shapes.prompt(self.shape, batch, self.device, self.dtype)}
        return self._inputs[batch]

    def _head(self, method: str, batch: int, inputs: Mapping[str, Any]) -> Row:
        return {
            "model": self.shape.name,
            "method": method,
            "batch": batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": "sdpa",
            "sequence": inputs["input_ids"].shape[1],
            "visual_tokens": self.shape.visual,
        }

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

    def _peak(self, inputs: Mapping[str, Any]) -> tuple[Any, int | None]:
        """A prefill and its peak bytes beyond weights and inputs (None on a CPU)."""
        if self.device.type != "cuda":
            return self._prefill(inputs), None
        outputs: list[Any] = []
        peak = peak_bytes(self.device, lambda: outputs.append(self._prefill(inputs)))
        return outputs[0], peak

    def _waits(self, inputs: Mapping[str, Any]) -> int | None:
        """How often a prefill, encoder included, waits for the device (None on a CPU)."""
        if self.device.type != "cuda":
            return None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self._prefill(inputs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    def _facts(self, inputs: Mapping[str, Any], report: CompressionReport) -> dict[str, Any]:
        """Lengths and cache bytes."""
        length, visual = inputs["input_ids"].shape[1], self.shape.visual
        kept = round(report.mean_keep_ratio * visual)
        return {
            "kept_at_last_layer": next(i.num_kept for s in report.samples for i in s.images),
            "mean_keep_ratio": report.mean_keep_ratio,
            "just_that_length": length - visual + kept,
            "kv_bytes": report.kv_bytes,
            "notes": list(report.notes),
        }

    def _round(
        self, variants: Mapping[str, Any], options: Mapping[str, Any]
    ) -> dict[str, dict[str, float]]:
        """Milliseconds of each variant, once; the prefill starts where the encoder ends.

        Those of the host end where the call returns, with nothing waited for; near those of the
        device, the host is what limits.
        """
        found = {}
        for name, inputs in variants.items():
            with self._as(name, options):
                synchronize(self.device)
                start, start_s = self._watch.mark(), time.perf_counter()
                self._prefill(inputs)
                end_s, end = time.perf_counter(), self._watch.mark()
                found[name] = {
                    "ttft_ms": self._watch.between(start, end),
                    "prefill_ms": self._watch.between(self._entered, end),
                    "host_ms": 1e3 * (end_s - start_s),
                    "host_prefill_ms": 1e3 * (end_s - self._entered_s),
                }
        return found

    def _times(self, variants: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Spreads]:
        least, most = ROUNDS
        done: list[dict[str, dict[str, float]]] = []
        start = time.perf_counter()
        while len(done) < least or (len(done) < most and time.perf_counter() - start < LIMIT_S):
            done.append(self._round(variants, options))
        return {
            kind: {name: quantiles([r[name][kind] for r in done]) for name in variants}
            for kind in next(iter(done[0].values()))
        }

    def _decode(self, inputs: Mapping[str, Any]) -> dict[str, float]:
        """Milliseconds between generated tokens, the first step (warm-up) left out."""
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
        return quantiles([self._watch.between(a, b) for a, b in steps])


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
