"""The benchmark of greedy selections: loops that choose alike, and what was measured."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks import greedy


def test_loops_of_the_papers_choose_what_they_print() -> None:
    # the specification's worked examples
    x = torch.tensor([[1, 0], [0.98, 0.2], [0, 1], [-0.7, 0.7]])
    assert greedy.divprune(x, 2).tolist() == [2, 0]
    similarity = torch.tensor([[1, 0.9, 0.1], [0.9, 1, 0.2], [0.1, 0.2, 1]])
    tokens, relevance = torch.linalg.cholesky(similarity)[None], torch.tensor([[1, 0.95, 0.5]])
    assert greedy.cdpruner(tokens, relevance, 3).tolist() == [[0, 2, 1]]


def test_a_dry_run_writes_both_methods(tmp_path: Path) -> None:
    out = tmp_path / "greedy.json"
    assert greedy.main(["--dry-run", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows] == ["divprune", "cdpruner"]
    assert [row["same"] for row in rows] == [1.0, 1.0]


@pytest.mark.parametrize("row", json.loads(greedy.OUT.read_text())["rows"], ids=lambda r: r["name"])
def test_what_was_measured_is_at_least_as_fast_and_chooses_the_same(row) -> None:
    assert row["ratio"]["median"] >= 1
    assert row["ratio"]["n"] >= 10
    assert row["same"] >= 0.95  # products that round otherwise may tell near ties apart
