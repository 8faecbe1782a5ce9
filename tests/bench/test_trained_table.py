"""The table of trained compressors: what each is tested against, and that runs asked the same."""

import json
from pathlib import Path

import pytest
from benchmarks.trained_table import main
from tests.bench.stored import change, write_results

TASKS = ("attribute", "needle")
OTHERS = {"divprune": 0.6, "cdpruner": 0.7}


def runs(folder: Path) -> tuple[str, str]:
    own = {"covipal": 0.9, "hicom": 0.5}
    write_results(folder / "own", own, keep_ratios=(0.5,), tasks=TASKS, questions=200)
    write_results(folder / "others", OTHERS, keep_ratios=(0.5, 0.25), tasks=TASKS, questions=200)
    return str(folder / "own"), str(folder / "others")


def test_each_is_tested_against_the_others_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, others = runs(tmp_path)
    main(["--run", own, "--beside", others])
    table, by_task = (part.splitlines()[2:] for part in capsys.readouterr().out.split("\n\n"))
    cells = [line.strip("| ").split(" | ") for line in table]
    assert [cell[:2] for cell in cells] == [["covipal", "0.5"], ["hicom", "0.5"]]
    for cell in cells:
        stored = json.loads((Path(own) / "cells" / f"{cell[0]}--0.5.json").read_text())
        means = [stored["tasks"][task]["mean"] for task in TASKS]
        assert cell[2] == f"{50 * sum(means):.1f}"
        assert [words.split()[0] for words in cell[3].split("; ")] == ["cdpruner", "divprune"]
    assert [line.strip("| ").split(" | ")[0] for line in by_task] == ["covipal", "hicom", *OTHERS]
    main(["--run", own, "--beside", others, "--only", "divprune"])
    assert "cdpruner" not in capsys.readouterr().out


def test_what_was_fine_tuned_stands_beside_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, others = runs(tmp_path)
    plain = json.loads((Path(others) / "cells" / "none.json").read_text())["tasks"]
    untouched = {task: [int(mark) for mark in plain[task]["right"]] for task in TASKS}
    wrong = {task: [0] * 200 for task in TASKS}
    told = {"method": "pmod", "right": {"untouched": untouched, "trained": wrong}}
    (tmp_path / "result.json").write_text(json.dumps(told))
    main(["--tuned", str(tmp_path), "0.25", "--beside", others])
    _, _, row, _, *by_task = capsys.readouterr().out.splitlines()
    assert row.startswith("| pmod, trained | 0.25 | 0.0 | cdpruner")
    assert "| pmod, trained | 0.25 | 0 | 0 |" in by_task
    told["right"] |= {"untouched": wrong}
    (tmp_path / "result.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="attribute: uncompressed answers differ"):
        main(["--tuned", str(tmp_path), "0.25", "--beside", others])


def test_runs_that_asked_other_questions_are_refused(tmp_path: Path) -> None:
    own, others = runs(tmp_path)

    def other(cell: dict[str, dict[str, dict[str, list[str]]]]) -> None:
        cell["tasks"]["needle"]["answers"][0] = "yellow"

    change(Path(others) / "cells" / "none.json", other)
    with pytest.raises(ValueError, match="needle: uncompressed answers differ"):
        main(["--run", own, "--beside", others])
