"""From finished cells to rows: seeds averaged, intervals over questions."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from vispress.bench.plan.cells import UNCOMPRESSED
from vispress.bench.plan.controls import RANDOM
from vispress.bench.plan.downsample import Downsample
from vispress.bench.results.compare import (
    ORACLE,
    Cells,
    Comparison,
    compare,
    loyalty,
    per_question,
    rankings,
)
from vispress.bench.results.cost_rows import Cost, cost_of
from vispress.bench.results.csv_rows import csv_text
from vispress.bench.results.derived_metrics import (
    accuracy_by_turn,
    gain,
    gap_closed,
    hard_subset,
    leakage,
)
from vispress.bench.results.files import write_json, write_text
from vispress.bench.results.ranking import Ranking
from vispress.bench.results.stats import Interval, bootstrap_mean
from vispress.bench.results.store import read_results

BLIND = "no_image"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Args:
        group: Method.
        keep_ratio: As asked; None for a method's own budget.
        seeds: Cells that were averaged.
        refused: Why there is no result, or None.
        tasks: Accuracy by task.
        accuracy: Mean over tasks.
        loyalty: Share of answers equal to the uncompressed model's, mean over tasks; None where
            that cell is not finished.
        visual_tokens: Visual tokens of an image.
        kept_mean: Kept of them, as a mean over decoder layers.
        kept_end: Kept at the last layer.
        cost: Times, memory and FLOPs; None where nothing was timed.
        control: Whether it is a control (random, oracle, down-sampling...), not a method.
        gap_closed: Share of the gap between random (0) and the oracle (1) at this keep ratio; None
            where that gap is not significant.
        hard: Accuracy on the hard subset: questions that the uncompressed model gets right and
            down-sampling at this keep ratio gets wrong; None where there are none.
        hard_questions: How many these are, over all tasks.
        gain: Multi-modal gain by task: accuracy less that of the same model without picture.
        mean_gain: Mean of it over tasks.
        turns: Accuracy of each turn, by task; only for tasks of several turns.
    """

    group: str
    keep_ratio: float | None
    seeds: int
    refused: str | None = None
    tasks: Mapping[str, Interval] | None = None
    accuracy: Interval | None = None
    loyalty: Interval | None = None
    visual_tokens: float = 0.0
    kept_mean: float = 0.0
    kept_end: float = 0.0
    cost: Cost | None = None
    control: bool = False
    gap_closed: Interval | None = None
    hard: Interval | None = None
    hard_questions: int = 0
    gain: Mapping[str, Interval] | None = None
    mean_gain: Interval | None = None
    turns: Mapping[str, tuple[Interval, ...]] | None = None

    @property
    def uncompressed(self) -> bool:
        """Whether this is the baseline."""
        return self.group == UNCOMPRESSED


@dataclass(frozen=True)
class Summary:
    """Everything that tables and plots show.

    Args:
        rows: In the order of the plan.
        chance: Accuracy of the best constant answer, by task.
        plan: The plan as stored.
        missing: Cells that are not finished.
        provenance: Of the last cell.
        comparisons: Methods against controls at equal budget.
        rankings: Places of methods and controls at each keep ratio, as far as they are certain.
        leakage: By task, how far the model without picture beats the best constant answer, at
            least 0; empty where the blind control is not finished.
    """

    rows: tuple[Row, ...]
    chance: Mapping[str, float]
    plan: Mapping[str, Any]
    missing: int
    provenance: Mapping[str, Any]
    comparisons: tuple[Comparison, ...] = ()
    rankings: tuple[Ranking, ...] = ()
    leakage: Mapping[str, float] = field(default_factory=dict)

    def find(self, group: str) -> Row | None:
        """Find the first row of a group that has results."""
        return next((r for r in self.rows if r.group == group and r.accuracy), None)


def summarise(folder: str | Path) -> Summary:
    """Read a results folder.

    Raises:
        ResultsError: It holds no run, or a file in it is damaged or of another run.
    """
    return summary_of(*read_results(Path(folder)))


def summary_of(manifest: Mapping[str, Any], cells: Sequence[dict[str, Any]]) -> Summary:
    """Turn what `read_results` gave into rows and comparisons."""
    groups: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for cell in cells:
        asked = cell["cell"]
        groups.setdefault((asked["group"], asked["keep_ratio"]), []).append(cell)
    seed = manifest["plan"]["seed"]
    chance = {name: card["chance"] for name, card in manifest["tasks"].items()}
    peers = Peers.of(groups)
    return Summary(
        rows=tuple(_row(*key, seeds, seed, peers) for key, seeds in groups.items()),
        chance=chance,
        plan=manifest["plan"],
        missing=len(manifest["plan"]["cells"]) - len(cells),
        provenance=cells[-1]["provenance"] if cells else {},
        comparisons=compare(cells, seed=seed),
        rankings=rankings(cells, seed=seed),
        leakage={} if peers.blind is None else leakage(peers.blind, chance),
    )


@dataclass(frozen=True)
class Peers:
    """The finished cells that rows are measured against.

    Args:
        baseline: The uncompressed model's.
        blind: The one without picture.
        at: Random, oracle and down-sampling, by name and keep ratio.
    """

    baseline: dict[str, Any] | None
    blind: Cells | None
    at: Mapping[tuple[str, float | None], Cells]

    @classmethod
    def of(cls, groups: Mapping[tuple[str, float | None], Cells]) -> "Peers":
        """Collect those of a run, as far as they are finished."""
        done = {
            key: cells
            for key, cells in groups.items()
            if not any("refused" in cell for cell in cells)
        }
        baseline = done.get((UNCOMPRESSED, None))
        return cls(None if baseline is None else dict(baseline[0]), done.get((BLIND, None)), done)


def _row(
    group: str,
    keep_ratio: float | None,
    cells: Sequence[dict[str, Any]],
    seed: int,
    peers: Peers,
) -> Row:
    refused = next((cell["refused"] for cell in cells if "refused" in cell), None)
    control = cells[0]["cell"]["control"]
    if refused is not None:
        return Row(
            group=group,
            keep_ratio=keep_ratio,
            seeds=len(cells),
            refused=refused,
            control=control,
        )
    right = per_question(cells)
    kept = [cell["kept"] for cell in cells]
    return Row(
        group=group,
        keep_ratio=keep_ratio,
        seeds=len(cells),
        tasks={name: bootstrap_mean([scores], seed=seed) for name, scores in right.items()},
        accuracy=bootstrap_mean(list(right.values()), seed=seed),
        visual_tokens=fmean(k["visual_tokens"] for k in kept),
        kept_mean=fmean(k["kept_mean_over_layers"] for k in kept),
        kept_end=fmean(k["kept_at_end"] for k in kept),
        cost=cost_of(cells),
        control=control,
        turns=accuracy_by_turn(cells, seed=seed) or None,
        **_against_peers(keep_ratio, cells, seed, peers),
    )


def _against_peers(
    keep_ratio: float | None, cells: Cells, seed: int, peers: Peers
) -> dict[str, Any]:
    """Compare a row with other cells, as far as these are finished."""
    compared: dict[str, Any] = {}
    if peers.baseline is not None:
        compared["loyalty"] = bootstrap_mean(loyalty(cells, peers.baseline), seed=seed)
    if peers.blind is not None:
        compared["gain"], compared["mean_gain"] = gain(cells, peers.blind, seed=seed)
    if keep_ratio is None:
        return compared
    random, oracle, small = (
        peers.at.get((name, keep_ratio)) for name in (RANDOM, ORACLE, Downsample.name)
    )
    if random is not None and oracle is not None:
        compared["gap_closed"] = gap_closed(cells, random, oracle, seed=seed)
    if small is not None and peers.baseline is not None:
        measured = hard_subset(cells, small, peers.baseline, seed=seed)
        compared["hard"], compared["hard_questions"] = measured
    return compared


def write_summary(summary: Summary, folder: str | Path) -> None:
    """Write `summary.json` and `summary.csv` (one line a row and task, `mean` included).

    Raises:
        ResultsError: They cannot be written.
    """
    folder = Path(folder)
    data = {
        "plan": summary.plan,
        "missing_cells": summary.missing,
        "chance": summary.chance,
        "provenance": summary.provenance,
        "rows": [asdict(row) for row in summary.rows],
        "comparisons": [asdict(test) for test in summary.comparisons],
        "rankings": [asdict(ranking) for ranking in summary.rankings],
        "leakage": summary.leakage,
    }
    write_json(folder / "summary.json", data)
    write_text(folder / "summary.csv", csv_text(summary))
