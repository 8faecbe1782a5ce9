"""Milliseconds by device events (or the host's clock), several calls in turns."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.gpu.record import quantiles

Call = Callable[[], Any]
FLUSH_BYTES = 256 * 2**20


class Stopwatch:
    """Times calls one by one; on a GPU nothing waits for the host between them.

    Args:
        device: Where the calls work.
        flush: Overwrite a buffer larger than the cache before every call (kernels); it also gives
            the host time to enqueue the call.
    """

    def __init__(self, device: torch.device, *, flush: bool = False) -> None:
        self.cuda = device.type == "cuda"
        size = FLUSH_BYTES if flush and self.cuda else 0
        self._buffer = torch.empty(size, dtype=torch.int8, device=device) if size else None

    def start(self) -> Any:
        """A mark in time."""
        if not self.cuda:
            return time.perf_counter()
        if self._buffer is not None:
            self._buffer.zero_()
        return self.mark()

    def mark(self) -> Any:
        """A mark in time, without the flush."""
        if not self.cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(self, first: Any, last: Any) -> float:
        """Milliseconds between two marks (waits for the last)."""
        if not self.cuda:
            return float(1e3 * (last - first))
        last.synchronize()
        return float(first.elapsed_time(last))


def in_turns(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    repeats: int = 30,
    warmup: int = 2,
    limit_s: float = 1.0,
    flush: bool = False,
) -> dict[str, dict[str, float]]:
    """Quantiles of the milliseconds of each call; every round times each of them once.

    Args:
        calls: By name.
        device: Where they work.
        repeats: Rounds at most.
        warmup: Rounds before, not counted; the last one says how many rounds fit.
        limit_s: Seconds that the counted rounds may take; there are at least three, two where a
            round takes a second. The second round of warming up is the last if it takes longer.
        flush: As in `Stopwatch`.
    """
    watch = Stopwatch(device, flush=flush)
    one_round = 0.0
    for number in range(max(1, warmup)):
        if number > 1 and one_round > limit_s:
            break
        synchronize(device)
        start = time.perf_counter()
        for call in calls.values():
            call()
        synchronize(device)
        one_round = time.perf_counter() - start
    rounds = max(3 if one_round < 1 else 2, min(repeats, int(limit_s / max(one_round, 1e-6))))
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    for _ in range(min(rounds, repeats)):
        for name, call in calls.items():
            start_mark = watch.start()
            call()
            marks[name].append((start_mark, watch.mark()))
    synchronize(device)
    return {n: quantiles([watch.between(a, b) for a, b in pairs]) for n, pairs in marks.items()}


def graph_ms(call: Call, device: torch.device, repeats: int = 20) -> dict[str, float] | str | None:
    """Quantiles of replays of a captured graph: what is left without launch gaps.

    Returns:
        None on a CPU; why it could not be captured.
    """
    if device.type != "cuda":
        return None
    try:
        stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except Exception as error:
        torch.cuda.synchronize(device)
        return f"{type(error).__name__}: {error}"[:200]
    found = in_turns({"graph": graph.replay}, device, repeats=repeats, limit_s=0.3, flush=True)
    return found["graph"]


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_rate(device: torch.device, size: int = 2**30) -> float:
    """Bytes a second, read and written, of a device-to-device copy of `size` bytes."""
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    found = in_turns({"copy": lambda: target.copy_(source)}, device, repeats=20)
    return 2 * source.numel() * 4 / (found["copy"]["median"] * 1e-3)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """FLOPs a second of a square matrix product on random data."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    found = in_turns({"mm": lambda: torch.mm(a, b, out=out)}, device, repeats=20)
    return 2 * size**3 / (found["mm"]["median"] * 1e-3)


def ceilings(device: torch.device, dry: bool) -> dict[str, float]:
    """The rates that floors are computed from, measured in this run."""
    edge = 128 if dry else 8192
    small = torch.zeros(1, device=device)
    launch = in_turns({"launch": lambda: small.add_(1)}, device, flush=True)
    rates = {
        "launch_ms": launch["launch"]["median"],
        "copy_bytes_per_s": copy_rate(device, 2**20 if dry else 2**30),
        "bf16_flops_per_s": matrix_rate(device, torch.bfloat16, edge),
        "fp32_flops_per_s": matrix_rate(device, torch.float32, edge // 2),
    }
    if device.type == "cuda":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            rates["tf32_flops_per_s"] = matrix_rate(device, torch.float32, edge)
        finally:
            torch.set_float32_matmul_precision(before)
    return rates
