"""Rows of parallel processes: resumed, cut by the deadline, and not lost when a process dies."""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest


def work(shard: str, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What a name asks for."""
    for name in names:
        if name.endswith("dies"):
            os._exit(9)
        if name.endswith("hangs"):
            time.sleep(60)
        yield {"name": name, "shard": shard, "process": os.getpid()}
        if name.endswith("last"):
            return


def part_in(folder: Path, seconds: float = 60.0) -> Any:
    import torch
    from benchmarks.gpu.record import Deadline, Part, Settings

    settings = Settings(torch.device("cpu"), folder, True, {"commit": "abc"})
    return Part("laws", settings, Deadline(seconds))


def run(part: Any, **shards: list[str]) -> dict[str, dict[str, Any]]:
    from benchmarks.gpu.shards import run_shards

    run_shards(part, shards, work, workers=2)
    return {row["name"]: row for row in part.rows}


@pytest.mark.slow
def test_every_shard_has_a_process_and_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    part = part_in(tmp_path)
    part.row("a1", lambda: {"old": True})
    rows = run(part, a=["a1", "a2"], b=["b1", "b2"], c=["c1"])
    assert set(rows) == {"a1", "a2", "b1", "b2", "c1"}
    assert rows["a1"]["old"]
    assert len({row["process"] for name, row in rows.items() if name != "a1"}) == 3
    assert part.not_reached == []


@pytest.mark.slow
def test_a_process_that_dies_is_an_error_row_and_another_goes_on(tmp_path: Path) -> None:
    rows = run(part := part_in(tmp_path), a=["a1", "a2 dies", "a3 last", "a4"])
    assert "exit code 9" in rows["a2 dies"]["error"]
    assert rows["a3 last"]["process"] != rows["a1"]["process"]
    assert rows["a4"]["process"] != rows["a3 last"]["process"]  # the one before ended by itself
    assert part.not_reached == []


@pytest.mark.slow
def test_a_shard_whose_processes_keep_dying_is_given_up(tmp_path: Path) -> None:
    names = [f"a{n} dies" for n in range(5)]
    rows = run(part := part_in(tmp_path), a=names)
    assert list(rows) == names[:3]
    assert part.not_reached == names[3:]


@pytest.mark.slow
def test_the_deadline_stops_processes_and_keeps_what_came(tmp_path: Path) -> None:
    start = time.monotonic()
    rows = run(part := part_in(tmp_path, 4.0), a=["a1", "a2 hangs"], b=["b1"])
    assert time.monotonic() - start < 30
    assert set(rows) == {"a1", "b1"}
    assert part.not_reached == ["a2 hangs"]


def test_processes_are_one_at_least_and_as_many_as_processors_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmarks.gpu.shards import workers_for

    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert workers_for(14) == 14
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert workers_for(14) == 2
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert workers_for(14) == 1
