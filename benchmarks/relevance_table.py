"""Write how relevance DPP stands beside every other method of a results folder, as Markdown.

    vispress join offline new --out both
    python benchmarks/relevance_table.py both

Tests are paired by question (sign flips) and corrected for the number of other methods at a keep
ratio (Holm). Conversations (later turns are not known at prefill) and what came first, or changed,
among frames stand apart from questions that one look answers.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

OURS: Final = "relevance_dpp"
APART: Final = {
    "conversations": ("multi_turn",),
    "frames": ("order", "change"),
}
SHOWN: Final = 5
"""Others in a row, the best ones."""


def before_the_llm(cell: Any) -> bool:
    """Tell whether all of a stored cell's placements lie before the LLM, or in the encoder."""
    from vispress.config import from_mapping

    if cell["cell"]["group"] in ("downsample", "oracle"):
        return False
    asked = cell["cell"]["methods"][0] | {"mean_keep_ratio": cell["cell"]["keep_ratio"]}
    asked.pop("keep_ratio", None)
    method: Any = from_mapping(asked)
    return all(p.stage.value in ("encoder", "pre_llm") for p in method.placements(6))


def of_tasks(cells: Sequence[Any], tasks: Sequence[str]) -> list[Any]:
    """Reduce cells to some tasks; refused ones, and those at no keep ratio, are left out."""
    return [
        {**cell, "tasks": {task: cell["tasks"][task] for task in tasks}}
        for cell in cells
        if "refused" not in cell and cell["cell"]["keep_ratio"] is not None
    ]


@dataclass(frozen=True)
class Row:
    """How a method stands at one keep ratio.

    Args:
        ratio: A mean over decoder layers.
        accuracy: In percent.
        others: The best ones with their accuracy, the method's less theirs, and p.
    """

    ratio: float
    accuracy: float
    others: str


def rows(cells: Sequence[Any], tasks: Sequence[str], group: str = OURS) -> list[Row]:
    """Test a method against each other one of its cells' keep ratios, and tell of the best ones.

    Args:
        cells: As stored.
        tasks: Those that count.
        group: The method.
    """
    from vispress.bench.results.compare import at_equal_budget, per_question, versus

    shown, found = of_tasks(cells, tasks), []
    tests = {(t.keep_ratio, t.control): t for t in versus(shown, group)}
    for ratio, groups in sorted(at_equal_budget(shown).items()):
        if group not in groups:
            continue
        accuracy = {n: fmean(map(fmean, per_question(c).values())) for n, c in groups.items()}
        others = sorted((n for n in groups if (ratio, n) in tests), key=lambda n: -accuracy[n])
        words = []
        for name in others[:SHOWN]:
            test = tests[ratio, name]
            low, high = 100 * test.difference.low, 100 * test.difference.high
            words.append(
                f"{name} {100 * accuracy[name]:.1f}: {100 * test.difference.mean:+.1f} "
                f"({low:+.1f} to {high:+.1f}), p {test.p_holm:.2g}"
            )
        found.append(Row(ratio, 100 * accuracy[group], "; ".join(words)))
    return found


def table(cells: Sequence[Any], tasks: Sequence[str]) -> list[str]:
    """Write a row for each keep ratio: ours, the best others, and what the tests say."""
    head = "| keep ratio | ours | others: accuracy, ours less theirs (95 %), p by Holm |"
    lines = [f"| {r.ratio:g} | {r.accuracy:.1f} | {r.others} |" for r in rows(cells, tasks)]
    return [head, "|---|---|---|", *lines]


def main(words: Sequence[str] | None = None) -> None:
    """Print tables of a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="results that hold relevance_dpp and others")
    args = parser.parse_args(words)
    from vispress.bench.results.store import read_results

    manifest, cells = read_results(args.folder)
    asked = manifest["plan"]["tasks"]
    apart = {name: [t for t in tasks if t in asked] for name, tasks in APART.items()}
    one_look = [task for task in asked if all(task not in tasks for tasks in apart.values())]
    early = [cell for cell in of_tasks(cells, asked) if before_the_llm(cell)]
    for who, among in (("methods before the LLM", early), ("all methods", cells)):
        for name, tasks in {"one look": one_look, **apart}.items():
            if tasks:
                print(f"\n{name}, {who} ({', '.join(tasks)})\n")
                print("\n".join(table(among, tasks)))


if __name__ == "__main__":
    main()
