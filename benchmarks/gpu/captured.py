"""What captured models take: prefills with their encoder, and decode steps, eager and from graphs.

Each variant is timed as it is and captured: untouched, compressed, on a text of the kept length.
Pixels to logits is one graph, so a captured prefill has no time of its own behind the encoder.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers import DynamicCache

from benchmarks.gpu import shapes
from benchmarks.gpu.record import Row, quantiles
from benchmarks.gpu.timing import Stopwatch, in_turns, synchronize
from vispress import capture, compress_model, compression_report, remove_compression
from vispress.bench.timing.memory import peak_bytes
from vispress.runtime.kv_cache.hf_compat import CACHE

STEPS = 8
"""Decode steps that are timed, behind as many that are not."""
QUESTIONS = 4
"""Prompts of other lengths that are asked."""
BY_TOKEN = {"input_ids", "attention_mask", "mm_token_type_ids"}
How = Literal["cuda", "tape"] | None


def row(
    model: Any,
    shape: shapes.Shape,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    options: Mapping[str, Any],
    backend: How = None,
) -> Row:
    """Times of one method beside the untouched model's, eager and captured.

    Args:
        model: As `shapes.build` makes it; compressed by nothing.
        shape: Its shape.
        batch: Samples.
        device: Where it is.
        dtype: Of its weights.
        options: Of `compress_model`.
        backend: Of `capture`.
    """
    inputs = shapes.prompt(shape, batch, device, dtype)
    with _as(model, options):
        prefill(model, inputs)
        report = compression_report(model)
    kept = round(report.mean_keep_ratio * shape.visual)
    length = inputs["input_ids"].shape[1] - shape.visual + kept
    text = shapes.text_prompt(shape, length, batch, device)
    found: Row = {
        "model": shape.name,
        "method": options["method"],
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "sequence": inputs["input_ids"].shape[1],
        "visual_tokens": shape.visual,
        "just_that_length": length,
        "backend": backend or "cuda",
    }
    variants = {"uncompressed": (inputs, {}), "compressed": (inputs, options), "text": (text, {})}
    for name, (given, asked) in variants.items():
        with _as(model, asked):
            found[name] = {
                "eager": times(model, given, device),
                "captured": captured_times(model, given, device, backend),
            }
            if name == "compressed":
                found["questions"] = {
                    "bucketed": question_times(model, given, device, backend, 32),
                    "exact": question_times(model, given, device, backend, 1),
                }
    return found | {"ratios": ratios(found)}


def times(model: Any, inputs: Mapping[str, Any], device: torch.device) -> Row:
    """Milliseconds of a prefill and of a step, and peak bytes beyond what was there."""
    repeats = 20 if device.type == "cuda" else 2
    found = in_turns({"ttft": lambda: prefill(model, inputs)}, device, repeats=repeats)
    peak = None
    if device.type == "cuda":
        peak = peak_bytes(device, lambda: prefill(model, inputs))
    steps = step_times(model, inputs, device)
    return {"ttft_ms": found["ttft"], "step_ms": steps, "peak_extra_bytes": peak}


def captured_times(
    model: Any, inputs: Mapping[str, Any], device: torch.device, backend: How = None
) -> Row:
    """The same from graphs; what ran without, and why, beside it."""
    with capture(model, backend=backend) as captured:
        found = times(model, inputs, device)
        report = captured.report()
    return found | {"graphs": report.graphs, "fallbacks": dict(report.fallbacks)}


def question_times(
    model: Any, inputs: Mapping[str, Any], device: torch.device, backend: How, bucket: int
) -> Row:
    """Milliseconds of captured prefills whose pictures were seen, and whose lengths were not.

    Args:
        model: Compressed or not.
        inputs: A prompt that ends with text.
        device: Where both are.
        backend: Of `capture`.
        bucket: Its `prompt_bucket`.
    """
    watch, marks = Stopwatch(device), []
    with capture(model, backend=backend, prompt_bucket=bucket) as captured:
        prefill(model, inputs)
        for less in range(1, QUESTIONS + 1):
            start = watch.start()
            prefill(
                model, {**inputs} | {name: inputs[name][:, :-less] for name in BY_TOKEN & {*inputs}}
            )
            marks.append((start, watch.mark()))
        report = captured.report()
    synchronize(device)
    found: Row = quantiles([watch.between(*pair) for pair in marks])
    return {"ttft_ms": found, "graphs": report.graphs, "exact": dict(report.exact)}


@torch.inference_mode()
def prefill(model: Any, inputs: Mapping[str, Any], cache: Any = None) -> Any:
    """A prefill on a KV cache, for the logits of the next token."""
    cache = DynamicCache() if cache is None else cache
    return model(**inputs, **{CACHE: cache}, use_cache=True, logits_to_keep=1)


@torch.inference_mode()
def step_times(model: Any, inputs: Mapping[str, Any], device: torch.device) -> dict[str, float]:
    """Milliseconds of decode steps behind a prefill."""
    cache, watch = DynamicCache(), Stopwatch(device)
    prefill(model, inputs, cache)
    mask, ids = inputs["attention_mask"], inputs["input_ids"][:, -1:]
    marks = []
    for _ in range(2 * STEPS):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        places = mask.sum(1, keepdim=True) - 1
        if hasattr(model.model, "rope_deltas"):
            places = places.expand(3, -1, -1)
        given = {"attention_mask": mask, "position_ids": places, CACHE: cache}
        start = watch.start()
        model(input_ids=ids, **given, use_cache=True, logits_to_keep=1)
        marks.append((start, watch.mark()))
    synchronize(device)
    return quantiles([watch.between(*pair) for pair in marks[STEPS:]])


def ratios(found: Mapping[str, Any]) -> dict[str, float]:
    """What the targets speak of, from medians: above 1 is faster."""

    def median(variant: str, how: str, what: str) -> float:
        return float(found[variant][how][what]["median"])

    out = {}
    for how in ("eager", "captured"):
        for what in ("ttft_ms", "step_ms"):
            own = median("compressed", how, what)
            out[f"{how}_{what}_over_compressed"] = median("uncompressed", how, what) / own
            out[f"{how}_{what}_text_over_compressed"] = median("text", how, what) / own
    return out


@contextmanager
def _as(model: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """Compressed, or as it is."""
    if options:
        compress_model(model, **options)
    try:
        yield
    finally:
        if options:
            remove_compression(model)
