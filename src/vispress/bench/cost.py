"""Prefill time and cache size against the uncompressed model, measured in turns.

Turns make ratios hold on a machine whose speed drifts: each round times both models back to back,
and the ratio is taken within the round.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from vispress.api import compress_model, compression_report, remove_compression
from vispress.bench.plan import Plan, Timing
from vispress.bench.stats import quantiles
from vispress.bench.subjects import Subject
from vispress.bench.tasks import Prompt
from vispress.methods.base import Compressor


def timed_batch(subject: Subject, prompts: Sequence[Prompt], size: int) -> list[Prompt]:
    """Up to `size` prompts of the commonest length, so that no padding is timed."""
    by_length: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        ids = subject.processor.tokenizer(prompt.text)["input_ids"]
        by_length.setdefault(len(ids), []).append(prompt)
    return max(by_length.values(), key=len)[:size]


def measure_cost(
    subject: Subject, chain: Sequence[Compressor], prompts: Sequence[Prompt], plan: Plan
) -> dict[str, Any]:
    """Time one batch's prefill (vision encoder included) both ways, and size both caches.

    Args:
        subject: The model, uncompressed.
        chain: What compresses it; none measures the uncompressed model against itself, which
            shows how much of a ratio is noise.
        prompts: One batch of equal length.
        plan: Positions and timing.

    Returns:
        Milliseconds and ratio as p20, median and p80; bytes of keys and values a prompt.
    """
    inputs = subject.encode(prompts)
    timing = plan.timing
    base_bytes = _cache_bytes(subject, inputs)
    kept_bytes = base_bytes
    base, kept, ratios = [], [], []
    for number in range(timing.rounds):
        first = _times(subject, inputs, timing)
        if chain:
            compress_model(subject.model, list(chain), positions=plan.positions)
        try:
            second = _times(subject, inputs, timing)
            if chain:
                kept_bytes = compression_report(subject.model).kv_bytes
        finally:
            if chain:
                remove_compression(subject.model)
        if number:  # the first round warms up
            base += first
            kept += second
            ratios.append(quantiles(second).median / quantiles(first).median)
    return {
        "batch": len(prompts),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "prefill_ms": asdict(quantiles(kept)),
        "uncompressed_prefill_ms": asdict(quantiles(base)),
        "prefill_ratio": asdict(quantiles(ratios)),
        "kv_bytes": kept_bytes / len(prompts),
        "uncompressed_kv_bytes": base_bytes / len(prompts),
    }


@torch.inference_mode()
def _prefill(subject: Subject, inputs: Any) -> Any:
    return subject.model(**inputs, use_cache=True, logits_to_keep=1)


def _times(subject: Subject, inputs: Any, timing: Timing) -> list[float]:
    """Milliseconds of some prefills, after one that is not counted."""
    cuda = subject.device.type == "cuda"
    times = []
    for _ in range(timing.repeats + 1):
        start = time.perf_counter()
        _prefill(subject, inputs)
        if cuda:
            torch.cuda.synchronize(subject.device)
        times.append(1e3 * (time.perf_counter() - start))
    return times[1:]


def _cache_bytes(subject: Subject, inputs: Any) -> int:
    """Bytes of keys and values after an uncompressed prefill."""
    layers = _prefill(subject, inputs).past_key_values.layers
    return sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values))
