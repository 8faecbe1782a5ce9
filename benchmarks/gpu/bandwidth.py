"""Part `bandwidth`: each kernel against reference, `torch.compile` and the floor of this device."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.cases import CASES
from benchmarks.gpu.kernel_tests import statuses
from benchmarks.gpu.record import Deadline, Part, Row, Settings
from benchmarks.gpu.sizes import SIZES, TINY, Case, Size
from benchmarks.gpu.timing import ceilings, graph_ms, in_turns

ORDER = ("video", "llava15", "qwen_16384", "llava_next", "qwen_1296")
"""Sizes by how much they matter, should the time not suffice."""

COMPILE_S = 8.0
"""Seconds a `torch.compile` row may take; loops of 512 steps may need more, and go without."""
AGAIN_S = 2.0
"""Seconds until it is stopped again, should the first stop have been swallowed."""
LIMIT_S = 0.25
GRAPH_MS = 20.0
"""Kernels up to so long are timed in a graph too: longer ones leave no gap to see."""


class TooSlowError(Exception):
    """A measurement was stopped."""


def run_part(settings: Settings, deadline: Deadline) -> Part:
    """All kernels first; `torch.compile`, which takes seconds a shape, behind them."""
    tests = statuses(settings)
    part = Part("bandwidth", settings, deadline, {"tests": tests})
    if part.complete:
        return part
    rates = part.extra.setdefault("ceilings", ceilings(settings.device, settings.dry))
    part.extra["tests"] = tests
    sizes = list(TINY.values()) if settings.dry else [SIZES[name] for name in ORDER]
    for compiling in (False, True):
        for op, size in _plan(sizes, by_op=compiling):
            name = f"{op}/{size.name}" + ("/compile" if compiling else "")
            measure = _compare_compiled if compiling else _compare
            case = _Lazy(CASES[op], size, settings.device)
            part.row(name, partial(_row, measure, case, rates, tests[op] == "green", settings))
            case.free()
    torch._dynamo.reset()  # compiled closures hold their inputs
    part.finish()
    return part


def _plan(sizes: Sequence[Size], *, by_op: bool) -> list[tuple[str, Size]]:
    """Ops and sizes that exist, size by size; or every op once before any twice."""
    # on the meta device nothing is allocated: does this op have this size?
    meta = torch.device("meta")
    pairs = [(op, size) for size in sizes for op in CASES if CASES[op](size, meta) is not None]
    if not by_op:
        return pairs
    rank = {(op, s.name): [own for o, own in pairs if o == op].index(s) for op, s in pairs}
    return sorted(pairs, key=lambda pair: rank[pair[0], pair[1].name])


class _Lazy:
    """A case that is made when it is measured."""

    def __init__(
        self,
        make: Callable[[Size, torch.device], Case | None],
        size: Size,
        device: torch.device,
    ) -> None:
        self._make, self._size, self._device = make, size, device

    def __call__(self) -> tuple[Case, Size]:
        torch.manual_seed(0)
        case = self._make(self._size, self._device)
        assert case is not None
        return case, self._size

    def free(self) -> None:
        """Give the inputs back."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _row(
    measure: Callable[[tuple[Case, Size], dict[str, float], bool, Settings], Row],
    case: _Lazy,
    rates: dict[str, float],
    green: bool,
    settings: Settings,
) -> Row:
    return measure(case(), rates, green, settings)


def _compare(
    made: tuple[Case, Size], rates: dict[str, float], green: bool, settings: Settings
) -> Row:
    case, size = made
    error = _difference(case)
    calls = {"kernel": case.kernel, "reference": case.reference}
    # the comparison has warmed both up
    times = in_turns(
        calls, settings.device, limit_s=LIMIT_S, repeats=_rounds(settings), warmup=1, flush=True
    )
    found: dict[str, Any] = _head(case, size, rates)
    found |= {"green": green, "max_difference": error}
    found |= {f"{name}_ms": spread for name, spread in times.items()}
    kernel = times["kernel"]["median"]
    graphed = kernel <= GRAPH_MS
    graph = graph_ms(case.kernel, settings.device) if graphed else None
    found["graph_ms"] = graph
    best = graph["median"] if isinstance(graph, dict) else kernel
    if green:
        found["speedup_over_reference"] = times["reference"]["median"] / kernel
        found["share_of_floor"] = found["floor_ms"] / kernel
        found["share_of_floor_in_graph"] = found["floor_ms"] / best
    return found


def _compare_compiled(
    made: tuple[Case, Size], rates: dict[str, float], green: bool, settings: Settings
) -> Row:
    case, size = made
    if case.compiled is None:
        return {"note": "not compiled"}
    torch._dynamo.reset()
    found: dict[str, Any] = _head(case, size, rates) | {"green": green}
    try:
        with within(COMPILE_S):
            fast = case.compiled("eager" if settings.dry else "inductor")
            calls = {"kernel": case.kernel, "compiled": fast}
            times = in_turns(
                calls,
                settings.device,
                limit_s=LIMIT_S,
                repeats=_rounds(settings),
                warmup=1 if settings.dry else 3,
                flush=True,
            )
    except TooSlowError:
        return found | {"note": f"not compiled and timed within {COMPILE_S:g} s"}
    found |= {f"{name}_ms": spread for name, spread in times.items()}
    if green:
        found["speedup_over_compiled"] = times["compiled"]["median"] / times["kernel"]["median"]
    return found


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Stops what runs inside with `TooSlowError`, as soon as Python gets to it (main thread only).

    The compiler may wrap that exception, or swallow it; then what it raised or gave counts for
    nothing.
    """
    late = False

    def stop(*_: Any) -> None:
        nonlocal late
        late = True
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    except Exception as error:
        if late:
            raise TooSlowError from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if late:
        raise TooSlowError


def _rounds(settings: Settings) -> int:
    return 1 if settings.dry else 50


def _head(case: Case, size: Size, rates: dict[str, float]) -> dict[str, Any]:
    """Op, shape and floor: the larger of bytes over copy rate and FLOPs over bf16 matrix rate."""
    by_bytes = 1e3 * case.bytes / rates["copy_bytes_per_s"]
    by_flops = 1e3 * case.flops / rates["bf16_flops_per_s"]
    return {
        "op": case.op,
        "size": size.name,
        "tokens": size.N,
        "width": size.D,
        "bound": case.bound,
        "bytes": case.bytes,
        "flops": case.flops,
        "floor_ms": max(by_bytes, by_flops),
    }


def _difference(case: Case) -> float:
    """Largest difference of kernel and reference on these inputs (for indices: share that differ).

    The tests judge; this shows that what was timed computed the same.
    """
    worst = 0.0
    pairs = zip(tree_leaves(case.kernel()), tree_leaves(case.reference()), strict=True)
    for mine, theirs in pairs:
        if mine.is_floating_point():
            delta = (mine.float() - theirs.float()).abs().nan_to_num(nan=float("inf"))
            worst = max(worst, float(delta.max()))
        else:
            worst = max(worst, float((mine != theirs).float().mean()))
    return worst
