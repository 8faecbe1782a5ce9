"""Part `models`: prefill, TTFT, decode, cache and memory of 7B shapes, compressed and not."""

import gc
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.budgets import fitting
from benchmarks.gpu.forwards import Bench
from benchmarks.gpu.record import Deadline, Part, Row, Settings
from benchmarks.gpu.shapes import SHAPES, TINY_SHAPES, Shape

LARGE_BATCH: dict[str, dict[int, tuple[str, ...]]] = {
    "llava_1_5_7b": {8: ("fastv", "divprune", "visionzip", "pyramiddrop"), 32: ("fastv",)},
    "llava_next_7b": {8: ("fastv",)},
    "qwen2_5_vl_7b": {8: ("fastv", "divprune")},
}
"""Methods beyond batch 1, where every method runs; chosen to fit nine minutes."""
DRY_METHODS = ("divprune", "fastv", "visionzip")


def run_part(settings: Settings, deadline: Deadline) -> Part:
    """One model at a time; each gets an equal share of the time that is left."""
    part = Part("models", settings, deadline)
    if part.complete:
        return part
    _release(settings.device)
    shapes = list((TINY_SHAPES if settings.dry else SHAPES).values())
    for number, shape in enumerate(shapes):
        share = Deadline(deadline.left / (len(shapes) - number))
        made: list[Bench] = []
        for batch, method in _plan(shape, settings):
            name = f"{shape.name}/b{batch}/{method}"
            if share.passed and part.find(name) is None:
                part.not_reached.append(name)
                continue
            part.row(name, partial(_row, shape, method, batch, made, settings))
        made.clear()
        _release(settings.device)
    part.finish()
    return part


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _plan(shape: Shape, settings: Settings) -> Iterator[tuple[int, str]]:
    if settings.dry:
        yield from ((1, method) for method in DRY_METHODS)
        return
    yield from ((1, method) for method in fitting(shape.crops))
    for batch, methods in LARGE_BATCH[shape.name].items():
        yield from ((batch, method) for method in methods)


def _row(shape: Shape, method: str, batch: int, made: list[Bench], settings: Settings) -> Row:
    """One method on one batch; the first row of a model builds it."""
    if not made:
        dtype = torch.float32 if settings.device.type == "cpu" else torch.bfloat16
        made.append(Bench(shape, settings.device, dtype))
    return made[0].measure(method, batch, 3 if settings.dry else 8)
