"""Part `bandwidth`: each kernel against reference, `torch.compile` and the floor of this device."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.cases import CASES, SIZES, TINY, Case, Size
from benchmarks.gpu.kernel_tests import statuses
from benchmarks.gpu.record import Deadline, Part, Row, Settings
from benchmarks.gpu.timing import ceilings, graph_ms, in_turns

ORDER = ("video", "llava15", "qwen_16384", "llava_next", "qwen_1296")
"""Sizes by how much they matter, should the time not suffice."""

COPIES_FROM_HOST = ("dct_lowpass",)
"""Ops whose public face brings small tables from the host, which a graph cannot record."""


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
        for size in sizes:
            for op, make in CASES.items():
                name = f"{op}/{size.name}" + ("/compile" if compiling else "")
                case = _Lazy(make, size, settings.device)
                if not case.exists:
                    continue
                green = tests[op] == "green"
                measure = _compare_compiled if compiling else _compare
                part.row(name, partial(_row, measure, case, rates, green, settings))
                case.free()
    torch._dynamo.reset()  # compiled closures hold their inputs
    part.finish()
    return part


class _Lazy:
    """A case that is made when it is measured."""

    def __init__(
        self,
        make: Callable[[Size, torch.device], Case | None],
        size: Size,
        device: torch.device,
    ) -> None:
        self._make, self._size, self._device = make, size, device
        # on the meta device nothing is allocated: does this op have this size?
        self.exists = make(size, torch.device("meta")) is not None

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
    times = in_turns(calls, settings.device, limit_s=0.4, repeats=_rounds(settings), flush=True)
    found: dict[str, Any] = _head(case, size, rates)
    found |= {"green": green, "max_difference": error}
    found |= {f"{name}_ms": spread for name, spread in times.items()}
    graph = graph_ms(case.kernel, settings.device) if case.op not in COPIES_FROM_HOST else None
    found["graph_ms"] = graph
    kernel = times["kernel"]["median"]
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
    fast = case.compiled("eager" if settings.dry else "inductor")
    calls = {"kernel": case.kernel, "compiled": fast}
    times = in_turns(
        calls, settings.device, limit_s=0.3, repeats=_rounds(settings), warmup=3, flush=True
    )
    found: dict[str, Any] = _head(case, size, rates) | {"green": green}
    found |= {f"{name}_ms": spread for name, spread in times.items()}
    if green:
        found["speedup_over_compiled"] = times["compiled"]["median"] / times["kernel"]["median"]
    return found


def _rounds(settings: Settings) -> int:
    return 3 if settings.dry else 50


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
