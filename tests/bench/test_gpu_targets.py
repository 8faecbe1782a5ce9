"""Targets are counted, the worst come first; and a measurement that takes too long is stopped."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu.bandwidth import TooSlowError, _plan, within
from benchmarks.gpu.cases import CASES
from benchmarks.gpu.record import Deadline, Part, Settings
from benchmarks.gpu.sizes import SIZES
from benchmarks.gpu.targets import print_targets, write_summary


def part_of(folder: Path, name: str, rows: list[dict[str, Any]]) -> Part:
    part = Part(name, Settings(torch.device("cpu"), folder, True, {}), Deadline(10.0))
    part.rows = rows
    return part


def copied(name: str, share: float | None, size: str = "video", bound: str = "bytes") -> Any:
    found = {"name": name, "bound": bound, "size": size}
    return found if share is None else found | {"share_of_floor_in_graph": share}


def test_targets_are_counted_and_the_worst_come_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bandwidth = [copied("a", 0.85), copied("b", 0.7), copied("c", 0.2), copied("not tested", None)]
    bandwidth += [copied("small", 0.1, size="llava15"), copied("flops", 0.1, bound="flops")]
    bandwidth += [{"name": "a/compile", "speedup_over_compiled": 1.4}]
    models = [{"name": "m", "overhead_share": 0.01}, {"name": "n", "overhead_share": 0.5}]
    models += [{"name": "o", "overhead_share": 0.7}, {"name": "p", "error": "x"}]
    parts = [part_of(tmp_path, "bandwidth", bandwidth), part_of(tmp_path, "models", models)]
    summary = write_summary(parts, tmp_path)
    copies, compiled, overhead, length = summary["targets"]
    assert (copies["met"], copies["missed"]) == (1, 2)
    assert list(copies["worst"]) == ["c", "b"]
    assert (compiled["met"], compiled["missed"]) == (0, 1)
    assert (overhead["met"], overhead["missed"]) == (1, 2)
    assert list(overhead["worst"]) == ["o", "n"]
    assert (length["met"], length["missed"]) == (0, 0)
    assert summary["parts"]["models"]["errors"] == 1
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    print_targets(summary)
    assert "1 met, 2 missed; worst: c 0.2, b 0.7" in capsys.readouterr().out


def test_without_a_part_there_is_no_summary(tmp_path: Path) -> None:
    print_targets(write_summary([], tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_takes_too_long_is_stopped() -> None:
    with pytest.raises(TooSlowError), within(0.05):
        time.sleep(5)
    with within(5.0):
        pass


def test_a_compiler_that_wraps_or_swallows_the_stop_changes_nothing() -> None:
    def wraps() -> None:
        try:
            time.sleep(5)
        except TooSlowError as error:
            raise RuntimeError("the backend failed") from error

    def swallows() -> None:
        with suppress(TooSlowError):
            time.sleep(5)

    for call in (wraps, swallows):
        with pytest.raises(TooSlowError), within(0.05):
            call()
    with pytest.raises(RuntimeError, match="own"), within(5.0):
        raise RuntimeError("own")


def test_every_op_comes_once_before_any_twice() -> None:
    sizes = [SIZES["video"], SIZES["llava15"], SIZES["qwen_16384"]]
    ops = [op for op, _ in _plan(sizes, by_op=True)]
    assert set(ops[: len(CASES)]) == set(CASES)
    assert sorted(_plan(sizes, by_op=True), key=str) == sorted(_plan(sizes, by_op=False), key=str)
