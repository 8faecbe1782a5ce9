"""Part `models`: prefill, TTFT, decode, cache and memory of 7B shapes, compressed and not."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks.gpu.budgets import IMPORTANT, by_importance, fitting
from benchmarks.gpu.forwards import Bench
from benchmarks.gpu.record import Deadline, Part, Row, Settings
from benchmarks.gpu.shapes import SHAPES, TINY_SHAPES, Shape

LARGE_BATCH: dict[str, dict[int, tuple[str, ...]]] = {
    "llava_1_5_7b": {8: ("fastv", "divprune", "visionzip"), 32: ("fastv", "divprune", "visionzip")},
    "llava_next_7b": {8: ("fastv", "divprune", "visionzip")},
    "qwen2_5_vl_7b": {8: ("fastv", "divprune", "pyramiddrop")},
    "qwen2_5_vl_7b_video": {},
}
"""Methods beyond batch 1, where every method runs: there the device, not the host, is the limit."""
DRY_METHODS = ("fastv", "visionzip")
VIDEO_METHODS = ("fastv", "divprune", "vidcom2", "evs", "pyramiddrop")
"""Methods of the video prompt, whose prefills take half a second each."""
UNTOUCHED = "uncompressed"
"""The row of a model and batch that those of the methods refer to."""
ROOM = 30 * 2**30
"""Bytes that should be free before a model is built (17 GB) and measured."""


@dataclass
class _Subject:
    """A shape and its model, which is built when a row needs it."""

    shape: Shape
    bench: list[Bench] = field(default_factory=list)


def run_part(settings: Settings, deadline: Deadline) -> Part:
    """Large batches and important methods of all models first, each with a share of the time."""
    part = Part("models", settings, deadline)
    if part.complete:
        return part
    release(settings.device)
    shapes = (TINY_SHAPES if settings.dry else SHAPES).values()
    subjects = [_Subject(shape) for shape in shapes]
    for important in (True, False):
        for number, subject in enumerate(subjects):
            share = Deadline(deadline.left / (len(subjects) - number))
            for batch, method in _plan(subject.shape, settings, important=important):
                name = f"{subject.shape.name}/b{batch}/{method}"
                if part.find(name) is None and share.passed:
                    part.not_reached.append(name)
                    continue
                part.row(name, partial(_row, part, subjects, subject, method, batch))
            if not important:
                subject.bench.clear()
                release(settings.device)
    part.finish()
    return part


def release(device: torch.device) -> None:
    """Give memory that nobody holds any more back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _plan(shape: Shape, settings: Settings, *, important: bool) -> Iterator[tuple[int, str]]:
    """Batches and methods, each batch's uncompressed row before its others."""
    if settings.dry:
        methods = VIDEO_METHODS[:1] if shape.frames else DRY_METHODS
        yield from ((1, name) for name in (UNTOUCHED, *methods) if important)
        return
    if important:
        for batch, methods in LARGE_BATCH[shape.name].items():
            yield from ((batch, method) for method in (UNTOUCHED, *methods))
        yield 1, UNTOUCHED
    if shape.frames:
        yield from ((1, method) for method in VIDEO_METHODS if important)
        return
    for method in by_importance(fitting(shape.crops)):
        if (method in IMPORTANT) == important:
            yield 1, method


def _row(part: Part, subjects: list[_Subject], own: _Subject, method: str, batch: int) -> Row:
    """One method on one batch; the first row of a model builds it."""
    device = part.settings.device
    if not own.bench:
        if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < ROOM:
            for subject in subjects:
                subject.bench.clear()
            release(device)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        own.bench.append(Bench(own.shape, device, dtype))
    bench = own.bench[0]
    if method == UNTOUCHED:
        return bench.uncompressed(batch)
    base = part.find(f"{own.shape.name}/b{batch}/{UNTOUCHED}")
    if base is None or "error" in base:
        return {"error": (base or {}).get("error", "the uncompressed row was not reached")}
    return bench.measure(method, batch, base)
