"""Part `sweep`: launch rules tried out; the winners are what the rules should say.

A rule is replaced in the kernel's module for the length of a measurement. Blocks change the order
of sums, so a winner is taken over by hand, into the rule, after its tests are run with it.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.cases import CASES
from benchmarks.gpu.record import Deadline, Part, Row, Settings
from benchmarks.gpu.sizes import SIZES, TINY
from benchmarks.gpu.timing import in_turns

Rule = dict[str, Any]


def _grid(**axes: tuple[Any, ...]) -> list[Rule]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


GRIDS: dict[str, list[Rule]] = {
    "merge_tokens": _grid(BLOCK_N=(2, 4, 8), BLOCK_D=(512, 1024), num_warps=(1, 2, 4)),
    "dct_lowpass": _grid(BLOCK_C=(8, 16, 32), num_warps=(4, 8, 16), num_stages=(2, 3)),
    "assign_nearest": _grid(BLOCK_N=(64, 128), BLOCK_M=(64, 128), num_warps=(4, 8)),
    "query_attention": _grid(BLOCK_N=(32, 64, 128), num_warps=(2, 4, 8)),
    "transition_scores": _grid(BLOCK_N=(1, 2), BLOCK_D=(512, 1024, 2048), num_warps=(1, 2, 4)),
    "maxmin_select": _grid(num_warps=(2, 4, 8, 16)),
    "dpp_select": _grid(BLOCK_N=(1, 2, 4), BLOCK_D=(1024, 2048, 4096), num_warps=(4, 8)),
    "gather_tokens": _grid(TILE=(512, 1024, 2048, 4096)),
}
"""What is tried for each op; keys that are left out stay as the rule has them. What has most to
gain comes first.
"""
RULES = {
    "maxmin_select": ("maxmin_select.kernel", "held_rule"),
    "dpp_select": ("_greedy", "whole_rule"),
}
"""Rules that are not the `launch_rule` of the op's own kernel."""
LIKELY: dict[str, tuple[str, ...]] = dict.fromkeys(GRIDS, ("llava_next", "video"))
LIKELY |= dict.fromkeys(("assign_nearest", "maxmin_select", "dpp_select"), ("llava_next",))


def run_part(settings: Settings, deadline: Deadline) -> Part:
    """A row for each op and size, with all that was tried and the winner."""
    part = Part("sweep", settings, deadline)
    if part.complete:
        return part
    # every op at its first size before any at its second
    plan = [(op, names[i]) for i in (0, 1) for op, names in LIKELY.items() if i < len(names)]
    if settings.dry:
        plan = [(op, "tiny") for op in ("transition_scores", "gather_tokens")]
    plan = [(op, size) for op, size in plan if part.find(f"{op}/{size}") is None]
    for number, (op, size) in enumerate(plan):
        name = f"{op}/{size}"
        share = Deadline(deadline.left / (len(plan) - number))
        row = part.row(name, partial(_sweep, op, size, settings, share))
        if row is not None and row.get("cut_short"):
            part.not_reached.append(name)
    part.extra = {
        "winners": {r["name"]: r["winner"] for r in part.rows if r.get("winner") is not None}
    }
    part.finish()
    return part


def _sweep(op: str, size: str, settings: Settings, deadline: Deadline) -> Row:
    torch.manual_seed(0)
    case = CASES[op]((TINY | SIZES)[size], settings.device)
    assert case is not None
    grid = GRIDS[op][:2] if settings.dry else GRIDS[op]
    expected = tree_leaves(case.kernel())
    repeats = 1 if settings.dry else 25
    default = _time(case.kernel, settings, repeats)
    tried: list[dict[str, Any]] = []
    for rule in grid:
        if deadline.passed:
            break
        entry: dict[str, Any] = {"rule": rule}
        try:
            with replaced(op, rule):
                got = tree_leaves(case.kernel())
                entry["agrees"] = _agree(expected, got)
                entry |= _time(case.kernel, settings, repeats)
        except Exception as error:  # too much shared memory, say
            entry["error"] = f"{type(error).__name__}: {error}"[:200]
        tried.append(entry)
    usable = [entry for entry in tried if entry.get("agrees") and "median" in entry]
    best = min(usable, key=lambda entry: entry["median"], default=None)
    return {
        "op": op,
        "size": size,
        "default_ms": default,
        "winner": None if best is None else best["rule"],
        "winner_ms": None if best is None else best["median"],
        "gain": None if best is None else default["median"] / best["median"],
        "cut_short": len(tried) < len(grid),
        "tried": tried,
    }


def _time(call: Callable[[], Any], settings: Settings, repeats: int) -> dict[str, float]:
    """Quantiles of a call that was made before."""
    found = in_turns(
        {"k": call}, settings.device, repeats=repeats, warmup=1, limit_s=0.1, flush=True
    )
    return found["k"]


def _agree(expected: list[Any], got: list[Any]) -> bool:
    """Same indices but for near ties, same numbers but for the order of sums."""
    for a, b in zip(expected, got, strict=True):
        if a.is_floating_point():
            if not float((a.float() - b.float()).norm()) <= 1e-2 * float(a.float().norm()):
                return False
        elif float((a != b).float().mean()) > 0.02:
            return False
    return True


@contextmanager
def replaced(op: str, rule: Rule) -> Iterator[None]:
    """The op's launch rule with these entries in place of its own."""
    home, name = RULES.get(op, (f"{op}.kernel", "TILE" if "TILE" in rule else "launch_rule"))
    module = import_module(f"vispress_kernels.{home}")
    before = getattr(module, name)
    if name == "TILE":
        value: Any = rule["TILE"]
    else:

        def value(*arguments: Any) -> Rule:
            known: Rule = before(*arguments)
            return known | rule

    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
