"""Results folders as one: methods measured later stand beside those that were there before."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vispress.bench.plan.provenance import now
from vispress.bench.results.files import ResultsError
from vispress.bench.results.opening import open_results
from vispress.bench.results.store import read_results
from vispress.bench.results.stored import folder_fault, joined_digest

_MAY_DIFFER = frozenset({"methods", "keep_ratios", "overrides", "controls", "cells"})
"""Entries of a plan that decide which cells there are, not what a cell measures."""


def merge_runs(folders: Sequence[Path], out: Path, *, force: bool = False) -> int:
    """Write the finished cells of several runs to one folder, which reports are made of.

    The runs must have asked the same model the same questions. Commits may differ: a cell keeps its
    own in its provenance, and cells that two runs share (the uncompressed model's, controls) must
    agree in every answer, which shows that nothing in between changed them.

    Args:
        folders: At least two; where they share a cell, the first one's is taken.
        out: A folder for the joined results; no run goes on in it.
        force: Move results of another identity in `out` to `previous-N/` in place of refusing.

    Returns:
        Cells that more than one folder holds.

    Raises:
        ResultsError: Fewer than two folders; one holds no run or a damaged file; their questions,
            models or shared cells differ, or they share none; `out` is in use or holds other
            results.
    """
    different = {folder.resolve() for folder in folders}
    if len(different) < 2:
        raise ResultsError(f"joining takes two folders or more, got {len(different)}")
    if out.resolve() in different:
        raise ResultsError(f"{out} is one of the folders to join; choose another --out")
    runs = [read_results(folder) for folder in folders]
    first, cells, shared = runs[0][0], {c["key"]: c for c in runs[0][1]}, 0
    for folder, (manifest, more) in zip(folders[1:], runs[1:], strict=True):
        _same_questions(folders[0], first, folder, manifest)
        common = [cell for cell in more if cell["key"] in cells]
        if not common:
            raise ResultsError(
                f"{folder} shares no finished cell with {folders[0]}: with one (the uncompressed "
                "model is in every plan) it could be seen that both measure the same"
            )
        for cell in common:
            _same_answers(cells[cell["key"]], cell, folder)
        cells |= {cell["key"]: cell for cell in more if cell["key"] not in cells}
        shared += len(common)
    if (fault := folder_fault(list(cells.values()))) is not None:
        raise ResultsError(f"these runs did not measure the same: {fault}")
    plan = _plan([manifest["plan"] for manifest, _ in runs])
    identities = [manifest["identity"] for manifest, _ in runs]
    identity = _identity(identities, plan)
    joined = {"plan": plan, "tasks": first["tasks"], "joined": identities, "created": now()}
    with open_results(out, identity, joined, force=force) as results:
        for key, cell in cells.items():
            results.write(key, {k: v for k, v in cell.items() if k not in ("key", "identity")})
    return shared


def _same_questions(
    path: Path, first: Mapping[str, Any], other_path: Path, other: Mapping[str, Any]
) -> None:
    """See that two runs asked one model the same."""
    pairs: dict[str, tuple[Any, Any]] = {
        name: (first["identity"].get(name), other["identity"].get(name))
        for name in ("weights", "version")
    }
    names = sorted((set(first["plan"]) | set(other["plan"])) - _MAY_DIFFER)
    pairs |= {name: (first["plan"].get(name), other["plan"].get(name)) for name in names}
    for task in sorted(set(first["tasks"]) | set(other["tasks"])):
        pairs[f"task {task}"] = (first["tasks"].get(task), other["tasks"].get(task))
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise ResultsError(
                f"{path} and {other_path} cannot be joined: {name} is {ours} in one and {theirs} "
                "in the other; run the second plan with what the first one asked"
            )


def _same_answers(known: Mapping[str, Any], cell: Mapping[str, Any], folder: Path) -> None:
    """See that a cell of two runs is the same one."""
    for name in ("cell", "refused", "tasks"):
        if known.get(name) != cell.get(name):
            what = {"cell": "hyper-parameters", "tasks": "answers"}.get(name, "reason of refusal")
            raise ResultsError(
                f"cell {cell['key']!r} of {folder} differs in its {what} from the same cell of "
                "another folder: code or machine changed what is measured in between. Run one of "
                "the plans again"
            )


def _plan(plans: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the plans: the first one, with the methods and cells of all."""
    ratios = _unique(ratio for plan in plans for ratio in plan["keep_ratios"])
    overrides: dict[str, Any] = {}
    for plan in plans:
        overrides |= plan["overrides"]
    known: dict[str, Any] = {}
    for plan in plans:
        for cell in plan["cells"]:
            known.setdefault(cell["key"], cell)
    return {
        **plans[0],
        "methods": _unique(method for plan in plans for method in plan["methods"]),
        "keep_ratios": sorted(ratios, reverse=True),
        "overrides": overrides,
        "cells": list(known.values()),
    }


def _identity(identities: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]) -> dict[str, Any]:
    commits = _unique(str(identity.get("commit")) for identity in identities)
    return {
        **identities[0],
        "plan": joined_digest(plan, identities),
        "commit": ", ".join(commits),
    }


def _unique(items: Iterable[Any]) -> list[Any]:
    """Drop repetitions, in order; entries may be mappings."""
    out: list[Any] = []
    for item in items:
        if item not in out:
            out.append(item)
    return out
