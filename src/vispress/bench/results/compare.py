"""Testing differences: paired at equal budget, corrected for the number of methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final, Literal

from vispress.bench.plan.controls import RANDOM
from vispress.bench.results.ranking import Ranking, rank
from vispress.bench.results.stats import (
    LEVEL,
    Interval,
    Strata,
    bootstrap_difference,
    holm,
    minus,
    sign_flip_test,
)

ORACLE: Final = "oracle"

Against = Literal["random", "best control", "every other"]
Cells = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A method and a control at the same keep ratio, on the same questions.

    Args:
        group: The method.
        keep_ratio: Of both.
        against: Which comparison this is; methods are corrected for within one.
        control: What it is compared with: a control or, by `versus`, another method. The best
            control is chosen on the same answers, which favours the control.
        difference: Accuracy of the method less that of the control, mean over tasks, in `[-1, 1]`.
        p: Two-sided, of a paired sign-flip test.
        p_holm: The same after Holm's correction over the methods at this keep ratio.
    """

    group: str
    keep_ratio: float
    against: Against
    control: str
    difference: Interval
    p: float
    p_holm: float

    @property
    def significant(self) -> bool:
        """Whether the difference stands at 5 % after the correction."""
        return self.p_holm < LEVEL


def per_question(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Average the score of each question over a group's seeds, by task."""
    return {
        task: [
            fmean(column)
            for column in zip(*(_scores(cell["tasks"][task]) for cell in cells), strict=True)
        ]
        for task in cells[0]["tasks"]
    }


def _scores(task: Mapping[str, Any]) -> list[float]:
    return list(task["scores"]) if "scores" in task else [float(bit) for bit in task["right"]]


def loyalty(cells: Sequence[Mapping[str, Any]], baseline: Mapping[str, Any]) -> Strata:
    """Compute the share of seeds that gave the uncompressed model's answer, by question.

    Args:
        cells: Seeds of one method at one budget.
        baseline: The uncompressed model's cell.

    Returns:
        One list a task.
    """
    return [
        [
            fmean(cell["tasks"][task]["answers"][i] == answer for cell in cells)
            for i, answer in enumerate(asked["answers"])
        ]
        for task, asked in baseline["tasks"].items()
    ]


def at_equal_budget(cells: Cells) -> dict[float, dict[str, list[Mapping[str, Any]]]]:
    """Group finished cells by keep ratio and group, without refused ones and those of no ratio."""
    groups: dict[float, dict[str, list[Mapping[str, Any]]]] = {}
    for cell in cells:
        asked = cell["cell"]
        if asked["keep_ratio"] is not None and "refused" not in cell:
            groups.setdefault(asked["keep_ratio"], {}).setdefault(asked["group"], []).append(cell)
    return groups


def compare(cells: Cells, *, seed: int = 0) -> tuple[Comparison, ...]:
    """Compare every method with random and with the best control, at each keep ratio.

    The oracle, which is told the answer's place, is no control to be beaten.

    Args:
        cells: Finished cells, as stored; refused ones and those without a keep ratio are left out.
        seed: Of the tests.
    """
    tests: list[Comparison] = []
    for keep_ratio, by_group in at_equal_budget(cells).items():
        scores = {name: list(per_question(seeds).values()) for name, seeds in by_group.items()}
        controls = [name for name, seeds in by_group.items() if seeds[0]["cell"]["control"]]
        methods = [name for name in by_group if name not in controls]
        controls = [name for name in controls if name != ORACLE]
        if not controls:
            continue
        best = max(controls, key=lambda name: fmean(map(fmean, scores[name])))
        # with the control's default label; under another one it still counts as a control
        if RANDOM in controls:
            tests += _family(methods, scores, RANDOM, "random", keep_ratio, seed)
        if best != RANDOM:
            tests += _family(methods, scores, best, "best control", keep_ratio, seed)
    return tuple(tests)


def versus(cells: Cells, group: str, *, seed: int = 0) -> tuple[Comparison, ...]:
    """Compare one method with every other method and control, the oracle aside, at each keep ratio.

    Args:
        cells: As in `compare`; those of some tasks alone compare these.
        group: The method; corrected for is the number of others at a keep ratio.
        seed: Of the tests.

    Returns:
        Differences of the method less the other one, in the order of the cells.
    """
    tests: list[Comparison] = []
    for keep_ratio, by_group in at_equal_budget(cells).items():
        if group not in by_group:
            continue
        scores = {name: list(per_question(seeds).values()) for name, seeds in by_group.items()}
        others = [name for name in scores if name not in (group, ORACLE)]
        gaps = [minus(scores[group], scores[other]) for other in others]
        values = [sign_flip_test(gap, seed=seed) for gap in gaps]
        tests += [
            Comparison(
                group=group,
                keep_ratio=keep_ratio,
                against="every other",
                control=other,
                difference=bootstrap_difference(gap, seed=seed),
                p=p,
                p_holm=corrected,
            )
            for other, gap, p, corrected in zip(others, gaps, values, holm(values), strict=True)
        ]
    return tuple(tests)


def rankings(cells: Cells, *, seed: int = 0) -> tuple[Ranking, ...]:
    """Rank methods and controls, the oracle aside, at each keep ratio.

    Args:
        cells: As in `compare`.
        seed: Of the tests.
    """
    made = []
    for keep_ratio, by_group in at_equal_budget(cells).items():
        scores = {
            name: list(per_question(seeds).values())
            for name, seeds in by_group.items()
            if name != ORACLE
        }
        if len(scores) > 1:
            made.append(rank(scores, keep_ratio, seed=seed))
    return tuple(made)


def _family(
    methods: Sequence[str],
    scores: Mapping[str, Strata],
    control: str,
    against: Against,
    keep_ratio: float,
    seed: int,
) -> list[Comparison]:
    """Test one Holm family: all methods against one control at one keep ratio."""
    gaps = {name: minus(scores[name], scores[control]) for name in methods}
    values = [sign_flip_test(gap, seed=seed) for gap in gaps.values()]
    return [
        Comparison(
            group=name,
            keep_ratio=keep_ratio,
            against=against,
            control=control,
            difference=bootstrap_difference(gap, seed=seed),
            p=p,
            p_holm=corrected,
        )
        for (name, gap), p, corrected in zip(gaps.items(), values, holm(values), strict=True)
    ]
