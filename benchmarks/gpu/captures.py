"""Part `captured`: 7B shapes as CUDA graphs, where no Python is waited for, beside eager calls."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import shapes
from benchmarks.gpu.captured import How, captured_times, row
from benchmarks.gpu.models import release
from benchmarks.gpu.record import Deadline, Part, Row, Settings

DIVPRUNE = {"method": "divprune", "num_tokens": 64}
FASTV = {"method": "fastv", "keep_ratio": 0.5}
TENTH = {"method": "divprune", "keep_ratio": 0.1}
PLAN: dict[str, dict[int, tuple[dict[str, Any], ...]]] = {
    "llava_1_5_7b": {1: (DIVPRUNE, FASTV), 8: (DIVPRUNE, FASTV)},
    "llava_next_7b": {1: (TENTH, FASTV), 8: (TENTH,)},
    "qwen2_5_vl_7b": {1: (TENTH,), 8: (TENTH,)},
    "qwen2_5_vl_7b_video": {1: (TENTH,)},
}
"""Batches and settings of each shape; what the targets speak of comes first."""


def run_part(settings: Settings, deadline: Deadline) -> Part:
    """A row a shape, batch and method; `graphs` and `fallbacks` say what ran from graphs."""
    part = Part("captured", settings, deadline)
    if part.complete:
        return part
    known = shapes.TINY_SHAPES if settings.dry else shapes.SHAPES
    for name, shape in known.items():
        held: list[Any] = []
        for batch, options in _rows(name, dry=settings.dry):
            measure = partial(_measure, settings, shape, held, batch, options)
            part.row(f"{name}/b{batch}/{options['method']}", measure)
        held.clear()
        release(settings.device)
    part.finish()
    return part


def _rows(name: str, *, dry: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    if dry:
        yield 1, TENTH
        return
    for batch, settings in PLAN[name].items():
        yield from ((batch, options) for options in settings)


def _measure(
    settings: Settings, shape: shapes.Shape, held: list[Any], batch: int, options: dict[str, Any]
) -> Row:
    """A row; the first of a shape builds its model."""
    device = settings.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    how: How = "tape" if device.type == "cpu" else None
    if not held:
        held.append(shapes.build(shape, device, dtype))
    found = row(held[0], shape, batch, device, dtype, options, how)
    text = shapes.text_prompt(shape, found["sequence"], batch, device)
    found["whole_text"] = {"captured": captured_times(held[0], text, device, how)}
    return found | speeds(found)


def speeds(found: Mapping[str, Any]) -> dict[str, float]:
    """What the targets speak of, from captured medians.

    A captured call is one graph from pixels to logits. What the encoder takes of it is the
    untouched call beyond that of a text as long as its prompt.
    """

    def median(variant: str, what: str = "ttft_ms") -> float:
        return float(found[variant]["captured"][what]["median"])

    whole, own, text = median("uncompressed"), median("compressed"), median("text")
    encoder = max(0.0, whole - median("whole_text"))
    return {
        "captured_encoder_ms": encoder,
        "captured_ttft_speedup": whole / own,
        "captured_prefill_speedup": (whole - encoder) / max(own - encoder, 1e-6),
        "captured_share_of_that_length": text / max(own - encoder, 1e-6),
        "captured_choosing_share": (own - encoder - text) / (whole - encoder),
        "captured_step_speedup": median("uncompressed", "step_ms")
        / median("compressed", "step_ms"),
    }
