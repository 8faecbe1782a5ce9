"""Picking questions to show: by rule and from stored marks, so that nobody picks by taste."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from vispress.bench.page.results import Results
from vispress.bench.plan.cells import UNCOMPRESSED
from vispress.bench.results.stored import Stored
from vispress.bench.results.summary import BLIND
from vispress.bench.tasks.task import RIGHT, Prompt, Score

FAILURES = 8
_PER_TASK = 2
_MOST = 0.5


@dataclass(frozen=True, kw_only=True)
class Pick:
    """A question that is shown.

    Args:
        task: Its task.
        index: Its number in the draw, from 0.
        why: The rule that chose it, in words.
    """

    task: str
    index: int
    why: str


def shown_budget(results: Results) -> float | None:
    """Find the budget that most groups have results at; of several, the smallest."""
    counts = {
        keep_ratio: len({c["cell"]["group"] for c in results.answered if at(c, keep_ratio)})
        for keep_ratio in results.keep_ratios
    }
    return max(counts, key=lambda ratio: (counts[ratio], -ratio)) if counts else None


def at(cell: Stored, keep_ratio: float | None) -> bool:
    """Tell whether a cell is of this budget."""
    return bool(cell["cell"]["keep_ratio"] == keep_ratio)


def shown_cells(results: Results) -> list[Stored]:
    """Choose one cell a group, its first seed: at the shown budget, or at one of its own."""
    keep_ratio = shown_budget(results)
    chosen: dict[str, Stored] = {}
    for cell in results.answered:
        group = cell["cell"]["group"]
        if group not in (UNCOMPRESSED, BLIND) and (at(cell, keep_ratio) or at(cell, None)):
            chosen.setdefault(group, cell)
    return list(chosen.values())


def samples(results: Results, number: int) -> list[Pick]:
    """Pick questions of every task: the first one, then those that methods disagree about most.

    Args:
        results: A folder.
        number: Of each task, at least 0.
    """
    picks = []
    for task in results.plan["tasks"]:
        wrong = _wrong(results, task)
        order = sorted(range(len(wrong)), key=lambda i: (abs(wrong[i] - 0.5), i))
        chosen = dict.fromkeys([0, *order])
        for place, index in enumerate(list(chosen)[:number]):
            why = "methods disagree about it most" if place else "the first question of its task"
            picks.append(Pick(task=task, index=index, why=why))
    return picks


def failures(results: Results) -> list[Pick]:
    """Pick questions that the uncompressed model answers and half of the methods do not."""
    baseline, methods = results.baseline, _methods(results)
    if baseline is None or not methods:
        return []
    candidates = []
    for number, task in enumerate(results.plan["tasks"]):
        right, wrong = baseline["tasks"][task]["right"], _wrong(results, task)
        lost = [i for i, mark in enumerate(right) if mark == "1" and wrong[i] >= _MOST]
        lost.sort(key=lambda i: (-wrong[i], i))
        candidates += [(-wrong[i], number, i, task) for i in lost[:_PER_TASK]]
    total = len(methods)
    return [
        Pick(task=task, index=i, why=f"{round(-share * total)} of {total} methods get it wrong")
        for share, _, i, task in sorted(candidates)[:FAILURES]
    ]


def strangers(
    results: Results, prompts: Mapping[str, Sequence[Prompt]], scores: Mapping[str, Score]
) -> list[str]:
    """Find tasks whose stored marks do not fit the questions as they are drawn now.

    Args:
        results: A folder.
        prompts: By task.
        scores: How each task scores an answer.
    """
    return [
        task
        for task, asked in prompts.items()
        if any(not _fits(cell["tasks"][task], asked, scores[task]) for cell in results.answered)
    ]


def _fits(stored: Stored, prompts: Sequence[Prompt], score: Score) -> bool:
    marks = zip(stored["right"], stored["answers"], prompts, strict=True)
    return all((mark == "1") == (score(answer, prompt) >= RIGHT) for mark, answer, prompt in marks)


def _methods(results: Results) -> list[Stored]:
    """Drop the controls from the shown cells."""
    return [cell for cell in shown_cells(results) if not cell["cell"]["control"]]


def _wrong(results: Results, task: str) -> list[float]:
    """Compute the share of methods that get each question wrong; 0 without methods."""
    columns = [cell["tasks"][task]["right"] for cell in _methods(results)]
    if not columns:
        return [0.0] * results.plan["questions"]
    return [fmean(mark == "0" for mark in marks) for marks in zip(*columns, strict=True)]
