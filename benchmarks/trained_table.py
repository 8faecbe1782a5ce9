"""Write how trained compressors stand beside other methods, question by question, as Markdown.

    tar xf benchmarks/results/relevance/runs.tar.xz
    tar xf benchmarks/results/trained/runs.tar.xz
    python -m benchmarks.trained_table --run run_trained --beside run_*_llava
    python -m benchmarks.trained_table --tuned benchmarks/results/trained/pmod 0.5 \\
        --beside run_high_llava run_ours_llava

A method is tested against each of the others at its keep ratio, not against those that were trained
beside it: paired by question (sign flips), corrected by Holm for the others. `--tuned` is a folder
of `benchmarks/fine_tune.py`, and the keep ratio of the others that it stands beside: there the
model has changed, and theirs has not. Runs must have asked the same questions of the same model.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.relevance_table import of_tasks, rows

HEAD = "| method | keep ratio | accuracy | others: accuracy, it less theirs (95 %), p by Holm |"


def read_cells(folders: Iterable[Path]) -> list[Any]:
    """Read the cells of results folders."""
    from vispress.bench.results.store import read_results

    return [cell for folder in folders for cell in read_results(folder)[1]]


def check_same(cells: Sequence[Any], tasks: Sequence[str]) -> None:
    """Check that runs asked the same: the uncompressed model's answers are alike in all.

    Raises:
        ValueError: They are not, or a question was answered rightly in one of them alone.
    """
    plain = [cell["tasks"] for cell in cells if cell["cell"]["group"] == "none"]
    for task in tasks:
        marks = {tuple(map(int, own[task]["right"])) for own in plain}
        answers = {tuple(own[task]["answers"]) for own in plain if "answers" in own[task]}
        if len(marks) > 1 or len(answers) > 1:
            raise ValueError(f"{task}: uncompressed answers differ, these runs asked other things")


def groups_of(cells: Sequence[Any]) -> list[str]:
    """List the groups of cells that were asked at a keep ratio, in their order."""
    return list(dict.fromkeys(c["cell"]["group"] for c in of_tasks(cells, ())))


def tuned_cells(result: Mapping[str, Any], ratio: float) -> list[Any]:
    """Make cells of what `benchmarks/fine_tune.py` wrote.

    Args:
        result: Its `result.json`.
        ratio: Of the others that it stands beside.
    """
    asked: dict[str, dict[str, Any]] = {
        stage: {"group": f"{result['method']}, {stage}", "keep_ratio": ratio, "control": False}
        for stage in result["right"]
    }
    asked["untouched"] |= {"group": "none", "keep_ratio": None}
    return [
        {"cell": asked[stage], "tasks": {task: {"right": row} for task, row in tasks.items()}}
        for stage, tasks in result["right"].items()
    ]


def table(cells: Sequence[Any], others: Sequence[Any], tasks: Sequence[str]) -> list[str]:
    """Write a row for each method and keep ratio of some cells, against others."""
    lines = [HEAD, "|---|---|---|---|"]
    for group in groups_of(cells):
        own = [cell for cell in cells if cell["cell"]["group"] == group]
        lines += [
            f"| {group} | {row.ratio:g} | {row.accuracy:.1f} | {row.others} |"
            for row in rows([*own, *others], tasks, group)
        ]
    return lines


def by_task(cells: Sequence[Any], tasks: Sequence[str]) -> list[str]:
    """Write percents of right answers by task, a row for each cell."""
    lines = [
        f"| method | keep ratio | {' | '.join(tasks)} |",
        "|---|---" + "|---" * len(tasks) + "|",
    ]
    for cell in of_tasks(cells, tasks):
        shares = [f"{100 * fmean(map(int, cell['tasks'][t]['right'])):.0f}" for t in tasks]
        asked = cell["cell"]
        lines.append(f"| {asked['group']} | {asked['keep_ratio']:g} | {' | '.join(shares)} |")
    return lines


def main(words: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="results of vispress bench")
    parser.add_argument("--tuned", nargs=2, action="append", default=[],
                        metavar=("FOLDER", "RATIO"), help="of benchmarks/fine_tune.py")  # fmt: skip
    parser.add_argument("--beside", type=Path, nargs="+", required=True, help="results of others")
    parser.add_argument("--only", nargs="+", help="those of them that it is tested against")
    args = parser.parse_args(words)
    others, own = read_cells(args.beside), read_cells([args.run] if args.run else [])
    for folder, ratio in args.tuned:
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
        own += tuned_cells(result, float(ratio))
    tasks = list(own[0]["tasks"])
    check_same([*own, *others], tasks)
    ratios = {cell["cell"]["keep_ratio"] for cell in own}
    compared = [
        cell
        for cell in others
        if cell["cell"]["keep_ratio"] in ratios
        and (not args.only or cell["cell"]["group"] in args.only)
    ]
    print("\n".join(table(own, compared, tasks)))
    print()
    print("\n".join(by_task([*own, *compared], tasks)))


if __name__ == "__main__":
    main()
