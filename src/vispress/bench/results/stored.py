"""What `run.json` and a cell say: whether it has its shape, and agrees with itself and the plan.

The one check of a results folder, made by everything that reads one and before a cell is written.
Numbers that are stored once and derive from nothing (times, sizes) are checked for their range.
"""

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Final

from vispress.bench.plan.provenance import digest
from vispress.bench.results.shapes import ANSWERED, DECODE, IDENTITY, MANIFEST, OVERHEAD, REFUSED

Stored = Mapping[str, Any]
"""A cell or `run.json`, as read."""

_SLACK: Final = 1e-9
"""By how much sums in another order may differ."""


def identity_of(data: Stored) -> dict[str, Any] | None:
    """Which run a cell or `run.json` says it is of; None where it does not say."""
    found: dict[str, Any] | None = data.get("identity")
    return found if IDENTITY(found, "identity") is None else None


def manifest_fault(data: Stored) -> str | None:
    """What is wrong with the content of a `run.json`, or None."""
    if (fault := MANIFEST(data, "")) is not None:
        return fault
    plan = data["plan"]
    keys = [cell["key"] for cell in plan["cells"]]
    if len(set(keys)) < len(keys):
        return f"plan.cells has {max(keys, key=keys.count)!r} twice"
    if list(data["tasks"]) != plan["tasks"]:
        return f"tasks describes {list(data['tasks'])}, plan.tasks asks {plan['tasks']}"
    if not _is_its_plan(data):
        return f"plan is not the one that identity.plan, {data['identity']['plan']}, is the hash of"
    return None


def is_joined(manifest: Stored) -> bool:
    """Whether it is of several runs, put in one folder by `vispress join`."""
    # folders that were joined before `joined` was stored are known by their commits
    return "joined" in manifest or ", " in str(manifest["identity"]["commit"])


def joined_digest(plan: Stored, identities: Sequence[Stored]) -> str:
    """What stands for the hash of the plan of joined runs."""
    return digest([plan, *identities])


def _is_its_plan(manifest: Stored) -> bool:
    plan, known = manifest["plan"], manifest["identity"]["plan"]
    if "joined" in manifest:
        return bool(known == joined_digest(plan, manifest["joined"]))
    return is_joined(manifest) or bool(known == digest(plan))


def cell_fault(data: Stored, key: str, manifest: Stored) -> str | None:
    """What is wrong with the content of a cell, or None.

    Args:
        data: The cell.
        key: Its name.
        manifest: A sound `run.json`, of the same run.
    """
    plan = manifest["plan"]
    shape = REFUSED if "refused" in data else ANSWERED
    if (fault := shape(data, "")) is not None:
        return fault
    if not data["key"] == data["cell"]["key"] == key:
        return f"it says it is {data['key']!r}, cell {data['cell']['key']!r}"
    # as text, for which 1 and true are not equal
    planned = [json.dumps(cell) for cell in plan["cells"] if cell["key"] == key]
    if json.dumps(data["cell"]) not in planned:
        return f"cell is not what the plan asks of {key!r}"
    if data["seed"] != plan["seed"]:
        return f"seed is {data['seed']}, the plan's is {plan['seed']}"
    if data["provenance"]["commit"] not in _commits(manifest):
        commit = data["provenance"]["commit"]
        return f"provenance.commit is {commit}, the run's is {manifest['identity']['commit']}"
    return None if "refused" in data else _answers_fault(data, plan)


def _commits(manifest: Stored) -> list[str | None]:
    commit = manifest["identity"]["commit"]
    return [None if one == "None" else one for one in str(commit).split(", ")]


def _answers_fault(data: Stored, plan: Stored) -> str | None:
    # tables and tests go by the order of tasks
    if list(data["tasks"]) != plan["tasks"]:
        return f"tasks are {list(data['tasks'])}, the plan asks {plan['tasks']}"
    for name, task in data["tasks"].items():
        if (fault := _task_fault(task, plan["questions"])) is not None:
            return f"tasks.{name}: {fault}"
    kept = data["kept"]
    for name in ("at_end", "mean_over_layers"):
        tokens, whole_of_it = kept[f"kept_{name}"], kept["visual_tokens"]
        if not _close(tokens, kept[f"ratio_{name}"] * whole_of_it):
            return f"kept: {tokens} of {whole_of_it} tokens are no share of {kept[f'ratio_{name}']}"
    return _cost_fault(data["cost"], plan["timing"]) if "cost" in data else None


def _task_fault(task: Stored, questions: int) -> str | None:
    right, scores, turns = task["right"], task.get("scores"), task.get("turns")
    marks = [float(bit) for bit in right] if scores is None else scores
    counts = task["questions"], len(right), len(marks), len(task["answers"])
    if set(counts) != {questions}:
        return (
            f"{counts[0]} questions, {counts[1]} marks, {counts[2]} scores and {counts[3]} answers "
            f"for {questions} questions"
        )
    if scores is not None and right != "".join("1" if one >= 0.5 else "0" for one in scores):
        return "right and scores contradict each other"
    if not _close(task["mean"], fmean(marks)):
        return f"mean is {task['mean']}, that of the {questions} marks is {fmean(marks)}"
    if not task["low"] - _SLACK <= task["mean"] <= task["high"] + _SLACK:
        return f"mean {task['mean']} is not between low {task['low']} and high {task['high']}"
    if turns is not None:
        lengths = [len(turn) for turn in turns]
        if lengths[0] != questions or lengths != sorted(lengths, reverse=True):
            return f"turns have {lengths} marks for {questions} questions"
    return None


def _cost_fault(cost: Stored, timing: Stored) -> str | None:
    if cost["batch"] > timing["batch"]:
        return f"cost.batch is {cost['batch']}, the plan's is {timing['batch']}"
    without = [name for name in DECODE if cost[name] is None]
    if len(without) != (0 if timing["decode_tokens"] else len(DECODE)):
        return f"cost has no {', '.join(without) or 'null'} for {timing['decode_tokens']} tokens"
    if len({cost[name] is None for name in OVERHEAD}) > 1:
        return f"cost has one of {', '.join(OVERHEAD)} without the other"
    for name, one in cost["flops"].items():
        if not _close(one["ratio"] * one["uncompressed"], one["compressed"]):
            return f"cost.flops.{name} contradicts itself: {one}"
    return None


def folder_fault(cells: Sequence[Stored]) -> str | None:
    """Where two sound cells of a run contradict each other, or None.

    They were asked the same questions, so either all were timed or none, on the same batch, and a
    conversation has its turns in all.
    """
    first, *others = [_asked_of(cell) for cell in cells if "refused" not in cell] or [("", {})]
    for key, facts in others:
        for name, value in first[1].items():
            if value != facts.get(name):
                return f"{name} is {value} in cell {first[0]!r} and {facts.get(name)} in {key!r}"
    return None


def _asked_of(cell: Stored) -> tuple[str, dict[str, Any]]:
    """A cell's name, and what must be the same in all."""
    cost = cell.get("cost")
    facts: dict[str, Any] = {"cost": "not measured" if cost is None else "measured"}
    if cost is not None:
        facts |= {f"cost.{name}": cost[name] for name in ("batch", "prompt_tokens")}
    facts |= {
        f"tasks.{name}.turns": [len(turn) for turn in task.get("turns", ())]
        for name, task in cell["tasks"].items()
    }
    return cell["key"], facts


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= _SLACK * max(1.0, abs(one), abs(other))
