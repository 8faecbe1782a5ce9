"""Write what each method and control scored in the committed sweeps: `results/by_method.csv`.

    python -m benchmarks.method_table

Each sweep is unpacked into a temporary folder, so nothing has to be unpacked ahead. Accuracies are
means over tasks with a 95 % bootstrap interval; differences are paired by question, method less
random at the same keep ratio, with p of a sign-flip test after Holm's correction.
"""

import csv
import io
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
TABLE = RESULTS / "by_method.csv"
SWEEPS = ("offline", "offline_qwen", "offline_clips")
COLUMNS = (
    "sweep", "method", "keep_ratio", "accuracy", "low", "high", "less_random", "less_random_low",
    "less_random_high", "p_holm",
)  # fmt: skip


def rows(sweep: str) -> Iterator[dict[str, str]]:
    """Yield a row for each method and keep ratio of a sweep, and one for the uncompressed model."""
    from vispress.bench.results.compare import compare, per_question
    from vispress.bench.results.stats import bootstrap_mean
    from vispress.bench.results.store import read_results

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(RESULTS / sweep / "run.json", folder)
        with tarfile.open(RESULTS / sweep / "cells.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        manifest, cells = read_results(folder)
    seed = manifest["plan"]["seed"]
    tests = {
        (test.group, test.keep_ratio): test
        for test in compare(cells, seed=seed)
        if test.against == "random"
    }
    groups: dict[tuple[str, float | None], list[dict[str, object]]] = {}
    for cell in cells:
        if "refused" not in cell:
            asked = cell["cell"]
            groups.setdefault((asked["group"], asked["keep_ratio"]), []).append(cell)
    for (group, ratio), seeds in groups.items():
        accuracy = bootstrap_mean(list(per_question(seeds).values()), seed=seed)
        row = {"sweep": sweep, "method": group, "keep_ratio": "" if ratio is None else f"{ratio:g}"}
        row |= _percents("accuracy", "low", "high", values=accuracy)
        if ratio is not None and (test := tests.get((group, ratio))) is not None:
            names = ("less_random", "less_random_low", "less_random_high")
            row |= _percents(*names, values=test.difference)
            row["p_holm"] = f"{test.p_holm:.2g}"
        yield row


def _percents(*names: str, values: object) -> dict[str, str]:
    ends = ("mean", "low", "high")
    return {
        name: f"{100 * getattr(values, end):.1f}" for name, end in zip(names, ends, strict=True)
    }


def table(sweeps: tuple[str, ...] = SWEEPS) -> str:
    """Write the rows of some sweeps as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for sweep in sweeps for row in rows(sweep))
    return text.getvalue()


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
