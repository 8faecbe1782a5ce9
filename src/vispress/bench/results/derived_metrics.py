"""Metrics beside accuracy: gap closed, the hard subset, gain over a blind model, turns."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from vispress.bench.results.compare import Cells, per_question
from vispress.bench.results.stats import (
    LEVEL,
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    minus,
    sign_flip_test,
)


def gap_closed(cells: Cells, random: Cells, oracle: Cells, *, seed: int = 0) -> Interval | None:
    """Compute where accuracy lies between random (0) and the oracle (1) at one budget.

    Args:
        cells: Seeds of a method.
        random: Seeds of the random control at the same keep ratio.
        oracle: The oracle there.
        seed: Of the bootstrap, which resamples questions of all three together, and the test.

    Returns:
        None where the oracle is not significantly better than random.
    """
    method, low, high = (list(per_question(group).values()) for group in (cells, random, oracle))
    gap = minus(high, low)
    if fmean(map(fmean, gap)) <= 0 or sign_flip_test(gap, seed=seed) >= LEVEL:
        return None
    won = minus(method, low)
    return bootstrap_ratio(
        [list(zip(*pair, strict=True)) for pair in zip(won, gap, strict=True)], seed=seed
    )


def hard_subset(
    cells: Cells, downsample: Cells, baseline: Mapping[str, Any], *, seed: int = 0
) -> tuple[Interval | None, int]:
    """Compute accuracy on the questions that a smaller picture loses at the same budget.

    These are right for the uncompressed model and wrong for down-sampling; they are pooled over
    tasks, since some tasks have none.

    Args:
        cells: Seeds of a method.
        downsample: Down-sampling at the same keep ratio.
        baseline: The uncompressed model's cell.
        seed: Of the bootstrap.

    Returns:
        Accuracy, None where there is no such question, and how many there are.
    """
    method, small = per_question(cells), per_question(downsample)
    scores = [
        method[task][i]
        for task, asked in baseline["tasks"].items()
        for i, right in enumerate(asked["right"])
        if right == "1" and small[task][i] == 0
    ]
    return (bootstrap_mean([scores], seed=seed) if scores else None), len(scores)


def gain(cells: Cells, blind: Cells, *, seed: int = 0) -> tuple[dict[str, Interval], Interval]:
    """Compute multi-modal gain (MMStar): accuracy less that of the model without the picture.

    Args:
        cells: Seeds of a method.
        blind: The cell without picture.
        seed: Of the bootstrap.

    Returns:
        By task, and the mean over tasks.
    """
    sighted, without = per_question(cells), per_question(blind)
    gaps = dict(zip(sighted, minus(list(sighted.values()), list(without.values())), strict=True))
    by_task = {task: bootstrap_difference([gap], seed=seed) for task, gap in gaps.items()}
    return by_task, bootstrap_difference(list(gaps.values()), seed=seed)


def leakage(blind: Cells, chance: Mapping[str, float]) -> dict[str, float]:
    """Compute multi-modal leakage (MMStar) by task: accuracy beyond chance without looking.

    MMStar compares with the language model before multi-modal training; here the best constant
    answer stands in its place.

    Args:
        blind: The cell without picture.
        chance: Accuracy of the best constant answer, by task.
    """
    return {
        task: max(0.0, fmean(scores) - chance[task]) for task, scores in per_question(blind).items()
    }


def accuracy_by_turn(cells: Cells, *, seed: int = 0) -> dict[str, tuple[Interval, ...]]:
    """Compute the accuracy of each turn, by task; tasks of one turn are left out."""
    by_task = {}
    for task, first in cells[0]["tasks"].items():
        if "turns" in first:
            columns = zip(*(cell["tasks"][task]["turns"] for cell in cells), strict=True)
            by_task[task] = tuple(bootstrap_mean([_means(flags)], seed=seed) for flags in columns)
    return by_task


def _means(seeds: Sequence[str]) -> list[float]:
    """Compute the share of seeds that got each question right."""
    return [fmean(map(int, column)) for column in zip(*seeds, strict=True)]
