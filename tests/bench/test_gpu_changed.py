"""What did not change since the last run on a GPU is carried over; what did is checked first."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import changed, kernel_tests, laws
from benchmarks.gpu.record import Deadline, Settings

CPU = torch.device("cpu")
DEVICE = {"device": "a GPU", "cuda": "13", "versions": {"torch": "2"}, "dry_run": False}


def settings_in(folder: Path, *, commit: str, dry: bool = False) -> Settings:
    identity = DEVICE | {"commit": commit, "source": commit, "dry_run": dry}
    return Settings(CPU, folder / commit, dry, identity, committed=folder / "old")


def ran(seen: list[list[str]]) -> Any:
    """Stands in for the tests: says what was asked for, and is green."""

    def run(settings: Settings, deadline: Deadline, names: Any) -> Any:
        seen.append(list(names))
        rows = [{"name": name, "status": "green", "passed": 1} for name in names]
        return rows, {"stopped": False}

    return run


def test_kernel_tests_run_for_ops_that_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(kernel_tests, "_run_tests", ran(seen))
    first = kernel_tests.run_part(settings_in(tmp_path, commit="old"), Deadline(10))
    assert seen == [list(kernel_tests.FILES)]
    assert first.complete
    monkeypatch.setattr(kernel_tests, "of_kernel_tests", lambda name: "x" * (name == "greedy"))
    data = json.loads(first.path.read_text())
    data["extra"]["digests"] = dict.fromkeys(kernel_tests.FILES, "")
    data["rows"][0]["status"] = "red"
    first.path.write_text(json.dumps(data))
    again = kernel_tests.run_part(settings_in(tmp_path, commit="new"), Deadline(10))
    red = data["rows"][0]["name"]
    assert seen[1:] == [[name for name in kernel_tests.FILES if name in ("greedy", red)]]
    assert {row["name"] for row in again.rows} == set(kernel_tests.FILES)
    assert {row.get("as_of") for row in again.rows} == {None, "old"}
    assert "greedy" not in {row["name"] for row in again.rows if "as_of" in row}


def test_another_device_or_the_same_code_carries_nothing(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    identity = DEVICE | {"commit": "a", "source": "a"}
    (old / "laws.json").write_text(json.dumps({"identity": identity, "rows": [], "extra": {}}))
    other = settings_in(tmp_path, commit="b")
    assert changed.last_run("laws", other)["identity"]["commit"] == "a"
    assert not changed.last_run("laws", settings_in(tmp_path, commit="a"))
    other.identity["device"] = "another"
    assert not changed.last_run("laws", other)
    assert not changed.last_run("laws", Settings(CPU, tmp_path, False, identity))


def test_laws_of_what_changed_come_first_and_the_rest_is_carried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def shards(part: Any, names: Any, work: Any, workers: int) -> None:
        for rows in names.values():
            new = [name for name in rows if part.find(name) is None]
            asked.extend(new)
            part.rows += [{"name": name, "ok": True} for name in new]

    monkeypatch.setattr(laws, "run_shards", shards)
    monkeypatch.setattr(laws, "workers_for", lambda most: 2)
    monkeypatch.setattr(laws, "of_runtime", lambda: "runtime")
    laws.run_part(settings_in(tmp_path, commit="old"), Deadline(10))
    everything = list(asked)
    asked.clear()
    known = changed.of_method
    monkeypatch.setattr(laws, "of_method", lambda m: "new" if m == "dart" else known(m))
    part = laws.run_part(settings_in(tmp_path, commit="new"), Deadline(10))
    assert {name.rpartition("/")[2] for name in asked} == {"dart"}
    assert {row["name"] for row in part.rows} == set(everything)
    asked.clear()
    monkeypatch.setattr(laws, "of_runtime", lambda: "another")
    laws.run_part(settings_in(tmp_path, commit="third"), Deadline(10))
    assert len(asked) == len(everything)
    of_llava = [n for n in asked if "/fp32/llava/" in n]
    assert [n.rpartition("/")[2] for n in of_llava[:5]] == ["dart"] * 5


def test_digests_tell_subjects_apart() -> None:
    methods = {name: changed.of_method(name) for name in ("fastv", "divprune", "visionzip")}
    assert len(set(methods.values())) == 3
    assert changed.of_kernel_tests("greedy") != changed.of_kernel_tests("dct_lowpass")
