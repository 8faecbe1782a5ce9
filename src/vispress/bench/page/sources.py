"""Provenance: everything that decides a number, and whether all cells share it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vispress.bench.page.results import Results
from vispress.bench.results.stored import is_joined


@dataclass(frozen=True, kw_only=True)
class Source:
    """Cells that were made in the same place.

    Args:
        cells: How many.
        facts: Name and value: commit, device, versions...
    """

    cells: int
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where the numbers come from.

    Args:
        facts: The same for all cells: plan, weights, dates.
        places: Usually one; several where a run went on elsewhere.
        plan: The plan as YAML.
    """

    facts: tuple[tuple[str, str], ...]
    places: tuple[Source, ...]
    plan: str


def sources(results: Results) -> Sources:
    """Describe where the page's numbers come from."""
    identity, plan = results.manifest["identity"], results.plan
    ends = sorted(cell["finished"] for cell in results.cells)
    joined, created = is_joined(results.manifest), results.manifest["created"]
    facts = {
        "model": plan["model"],
        "weights (SHA-256, beginning)": identity.get("weights"),
        "vispress": identity["version"],
        "commit": identity.get("commit") or "none (an installed package)",
        "plan (hash)": identity.get("plan"),
        "seed of questions and bootstrap": plan["seed"],
        "seeds of methods": _seeds(results) or "none",
        "questions": f"{plan['questions']} a task",
        "joined" if joined else "started": created,
        "last cell finished": ends[-1] if ends else None,
    }
    if ends and ends[0] < created and not joined:
        facts["clock"] = (
            "cells were finished before the run began: it was set back, or run.json was made anew; "
            "nothing that is measured depends on it"
        )
    return Sources(
        facts=tuple((name, str(value)) for name, value in facts.items() if value is not None),
        places=_places(results),
        plan=_yaml(plan),
    )


def _seeds(results: Results) -> str:
    by_group: dict[str, list[int]] = {}
    for cell in results.plan["cells"]:
        if cell["seed"] is not None:
            seeds = by_group.setdefault(cell["group"], [])
            if cell["seed"] not in seeds:
                seeds.append(cell["seed"])
    return "; ".join(f"{group} {', '.join(map(str, seeds))}" for group, seeds in by_group.items())


def _places(results: Results) -> tuple[Source, ...]:
    counts: dict[str, int] = {}
    for cell in results.cells:
        text = json.dumps(cell["provenance"], sort_keys=True)
        counts[text] = counts.get(text, 0) + 1
    return tuple(
        Source(cells=count, facts=tuple(_facts(json.loads(text)))) for text, count in counts.items()
    )


def _facts(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    for name, value in provenance.items():
        if isinstance(value, Mapping):
            facts.append((name, ", ".join(f"{key} {value[key]}" for key in sorted(value))))
        else:
            facts.append((name, str(value)))
    return facts


def stored_plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce a stored plan to what a run takes: without its cells spelt out.

    Files that it imported are left out, too: who reads results runs nobody's code.
    """
    return {k: v for k, v in plan.items() if k not in ("cells", "sources", "imports")}


def _yaml(plan: Mapping[str, Any]) -> str:
    """Write the plan as a file that `vispress bench` takes, with the tasks that it described."""
    import yaml

    described = {
        name: {key: value for key, value in source.items() if key != "fingerprint"}
        for name, source in plan.get("sources", {}).items()
    }
    tasks = [described.get(name, name) for name in plan["tasks"]]
    imported = {"import": sorted(plan["imports"])} if plan.get("imports") else {}
    written = imported | stored_plan(plan) | {"tasks": tasks}
    return yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=96)
