"""The table of relevance DPP beside others: who is in it, and which tasks stand apart."""

import json
from pathlib import Path

import pytest
from benchmarks.relevance_table import main
from tests.bench.stored import write_results

SKILLS = {"relevance_dpp": 0.9, "divprune": 0.6, "fastv": 0.7, "random": 0.3, "oracle": 1.0}


def test_others_are_ranked_and_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ("attribute", "needle", "multi_turn")
    write_results(tmp_path, SKILLS, keep_ratios=(0.5,), tasks=tasks, questions=200)
    main([str(tmp_path)])
    parts = capsys.readouterr().out.split("\n\n")
    assert [part.strip() for part in parts[::2]] == [
        f"{what}, {who} ({where})"
        for who in ("methods before the LLM", "all methods")
        for what, where in (("one look", "attribute, needle"), ("conversations", "multi_turn"))
    ]
    for part, others in zip(
        parts[1::2], (("divprune", "random"),) * 2 + (("fastv",),) * 2, strict=True
    ):
        ratio, _, words = part.strip().splitlines()[2].strip("| ").split(" | ")
        assert (ratio, len(words.split("; "))) == ("0.5", 3 if "fastv" in others else 2)
        assert words.startswith(others[0])
    cell = json.loads((tmp_path / "cells" / "relevance_dpp--0.5.json").read_text())
    accuracy = [cell["tasks"][task]["mean"] for task in tasks]
    assert f"| {100 * sum(accuracy[:2]) / 2:.1f} |" in parts[1]
    assert f"| {100 * accuracy[2]:.1f} |" in parts[3]
