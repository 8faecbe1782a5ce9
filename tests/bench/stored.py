"""Results folders written by hand: any methods, budgets and answers, no model."""

import json
import random
from pathlib import Path

import vispress
from vispress.bench.plan.provenance import digest
from vispress.registry import list_methods

IDENTITY = {
    "plan": "the hash of the plan",
    "commit": "0123456789ab",
    "version": vispress.__version__,
    "weights": "fedcba",
}
CONTROLS = ("random", "uniform", "downsample", "no_image", "oracle")


def spread(value, by=0.1):
    """A measured time."""
    return {"p20": value * (1 - by), "median": value, "p80": value * (1 + by)}


def cost(share):
    """What a cell that keeps this share measured."""
    found = {"batch": 4, "prompt_tokens": 160}
    for name in ("encoder", "prefill", "ttft", "decode"):
        ratio = 1.0 if name in ("encoder", "decode") else 0.2 + 0.8 * share
        found |= {f"{name}_ms": spread(20 * ratio), f"uncompressed_{name}_ms": spread(20.0)}
        found |= {f"{name}_ratio": spread(ratio, 0.03)}
    found |= {"overhead_ms": spread(0.5), "overhead_share": spread(0.02)}
    found |= {"peak_bytes": 5e6 * share + 1e6, "uncompressed_peak_bytes": 6e6}
    found |= {"kv_bytes": 1e5 * share + 1e4, "uncompressed_kv_bytes": 1.1e5}
    flops = {"compressed": 1e9 * share, "uncompressed": 1e9, "ratio": share}
    return found | {"flops": dict.fromkeys(("mac3", "flop3", "fastv2"), flops)}


def write_results(
    folder,
    groups,
    *,
    keep_ratios=(0.5, 0.25),
    tasks=("attribute", "needle"),
    questions=20,
    skip=(),
    refused=(),
    timed=True,
    truth="red",
):
    """Write a results folder.

    Args:
        folder: Where.
        groups: Skill in `[0, 1]` by group: the share of questions it gets right uncompressed.
        keep_ratios: Budgets.
        tasks: Names of tasks.
        questions: Of each.
        skip: Keys of cells that are not written.
        refused: Keys of cells that could not run.
        timed: Whether cells have a cost.
        truth: Every right answer; wrong ones are `"blue"`.
    """
    manifest = manifest_of(groups, keep_ratios, tasks, questions, timed)
    cells, identity = manifest["plan"]["cells"], manifest["identity"]
    (Path(folder) / "cells").mkdir(parents=True)
    (Path(folder) / "run.json").write_text(json.dumps(manifest))
    for cell in cells:
        if cell["key"] not in skip:
            data = {"key": cell["key"], "identity": identity, "cell": cell}
            if cell["key"] in refused:
                data["refused"] = "this budget cannot be reached"
            else:
                skill = {"none": 0.95, "no_image": 0.13}.get(cell["group"]) or groups[cell["group"]]
                data |= answered(cell, skill, tasks, questions, timed, truth)
            data |= {"seed": 0, "provenance": provenance(), "finished": "2026-01-02T03:05:06"}
            (Path(folder) / "cells" / f"{cell['key']}.json").write_text(json.dumps(data))
    return Path(folder)


def manifest_of(groups=(), keep_ratios=(0.5,), tasks=("needle",), questions=4, timed=False):
    """What `run.json` holds."""
    cells = [asked("none", None)]
    for group in groups:
        ratios = (None,) if group == "no_image" else keep_ratios
        cells += [asked(group, ratio) for ratio in ratios]
    plan = {
        "tasks": list(tasks),
        "methods": list(groups),
        "keep_ratios": list(keep_ratios),
        "budget": "mean",
        "model": "somebody/else",
        "questions": questions,
        "batch_size": 8,
        "seed": 0,
        "positions": None,
        "max_new_tokens": 2,
        "overrides": {},
        "controls": "none",
        "dtype": "fp32",
        "timing": {"batch": 4 if timed else 0, "rounds": 2, "repeats": 1, "decode_tokens": 2},
        "cells": cells,
    }
    cards = {task: {"chance": 0.125, "needs": f"what {task} needs"} for task in tasks}
    identity = IDENTITY | {"plan": digest(plan)}
    return {
        "identity": identity,
        "plan": plan,
        "tasks": cards,
        "created": "2026-01-02T03:04:05",
    }


def change(path, edit):
    """Edit a stored JSON file."""
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def restamp(folder, edit=lambda manifest: None, **identity):
    """Make a folder one of another run: another identity, and a plan that was edited.

    Args:
        folder: The folder.
        edit: Changes `run.json` in place; cells are made to follow its plan's.
        **identity: Entries that differ.
    """
    manifest = json.loads((folder / "run.json").read_text())
    edit(manifest)
    manifest["identity"] |= identity | {"plan": digest(manifest["plan"])}
    (folder / "run.json").write_text(json.dumps(manifest))
    planned = {cell["key"]: cell for cell in manifest["plan"]["cells"]}
    for path in (folder / "cells").iterdir():

        def follow(cell):
            cell["identity"] = manifest["identity"]
            cell["cell"] = planned[cell["key"]]
            cell["seed"] = manifest["plan"]["seed"]
            cell["provenance"]["commit"] = manifest["identity"]["commit"]

        change(path, follow)
    return folder


def remark(cell, task, right, answers):
    """Give a cell other marks and answers."""
    mean = sum(map(int, right)) / len(right)
    cell["tasks"][task] |= {"right": right, "answers": answers, "mean": mean}


def asked(group, ratio):
    """What the plan says of a cell."""
    key = group if ratio is None else f"{group}--{ratio:g}"
    return {
        "key": key,
        "group": group,
        "methods": [{"method": group}] if group in list_methods() else [],
        "control": group in CONTROLS,
        "keep_ratio": ratio,
        "seed": None,
    }


def answered(cell, skill, tasks, questions, timed, truth):
    """Answers of a cell; the same question is as hard for everyone."""
    share = cell["keep_ratio"] or (0.0 if cell["group"] == "no_image" else 1.0)
    chance = skill * (0.4 + 0.6 * share**0.3)
    found = {}
    for task in tasks:
        hard = random.Random(task)
        own = random.Random(cell["key"] + task)
        right = [0.7 * hard.random() + 0.3 * own.random() < chance for _ in range(questions)]
        found[task] = {
            "questions": questions,
            "mean": sum(right) / questions,
            "low": 0.0,
            "high": 1.0,
            "right": "".join(str(int(mark)) for mark in right),
            "answers": [truth if mark else "blue" for mark in right],
        }
    kept = {
        "images": questions * len(tasks),
        "visual_tokens": 144.0,
        "kept_at_end": 144 * share * 0.9,
        "kept_mean_over_layers": 144 * share,
        "ratio_at_end": share * 0.9,
        "ratio_mean_over_layers": share,
    }
    return {"tasks": found, "kept": kept, "notes": []} | ({"cost": cost(share)} if timed else {})


def provenance():
    """Where it all comes from."""
    return {
        "commit": IDENTITY["commit"],
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "device": "cpu (x86_64, 2 threads)",
        "dtype": "float32",
        "attention": "sdpa",
    }


def without_times(cell):
    """A cell without what differs when it is made again."""
    return {name: cell[name] for name in cell if name not in ("cost", "finished", "provenance")}
