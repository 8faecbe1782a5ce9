"""A benchmark under a kill, a full disk, a folder that is read-only, power loss, a clock set back.

Each is done to `python -m vispress.bench` in a process of its own, on the shipped plan `smoke` with
fewer methods and questions. Nothing may be lost, done twice or taken for what it is not.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tests.bench.stored import without_times

from vispress.bench.page.render import write_page
from vispress.bench.plan.plan import load_plan
from vispress.bench.results.store import MANIFEST, read_results

pytestmark = pytest.mark.full

METHODS, CELLS = ("fastv", "divprune", "random", "no_image"), 8
BENCH = "import runpy; runpy.run_module('vispress.bench', run_name='__main__')"

# Permission bits bind root, too, once it has given up the right to override them (capabilities 1
# and 2); who is not root has nothing to give up. It stands for a folder of another user's, or on a
# disk that was mounted read-only.
ORDINARY = f"""
import ctypes
class Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]
class Data(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]
libc, header, data = ctypes.CDLL(None), Header(0x20080522, 0), (Data * 2)()
assert libc.capget(ctypes.byref(header), data) == 0
data[0].effective &= ~0b110
data[0].permitted &= ~0b110
assert libc.capset(ctypes.byref(header), data) == 0
{BENCH}
"""

# Every look at the clock is an hour earlier than the one before, beginning a year ago.
CLOCK = f"""
import time
from datetime import UTC, datetime, timedelta
from vispress.bench.run import engine
first, looks = datetime.now(UTC) - timedelta(days=365), iter(range(10**6))
past = lambda: first - timedelta(hours=next(looks))
engine.now = lambda: past().isoformat(timespec="seconds")
time.time = lambda: past().timestamp()
{BENCH}
"""


@dataclass(frozen=True)
class Bench:
    """A plan, and where its results go.

    Args:
        plan: A file.
        out: The folder.
    """

    plan: Path
    out: Path

    def start(self, program=BENCH, **options):
        """Start a process."""
        command = [sys.executable, "-c", program, str(self.plan), "--out", str(self.out)]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, **pipes, **options)

    def finish(self, program=BENCH, **options):
        """Run to the end; what it says there is returned."""
        process = self.start(program, **options)
        _, said = process.communicate()
        assert "Traceback" not in said, said
        return process.returncode, said

    def cells(self):
        """Text and time of writing of each finished cell; temporary files are none."""
        found = sorted((self.out / "cells").glob("*.json"))
        return {path.stem: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}

    def wait(self, process, *, cells):
        """Until the process holds the folder, and so many cells are finished."""
        end = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < end:
            if self.owner() == process.pid and len(self.cells()) >= cells:
                return
            time.sleep(0.01)
        raise AssertionError(f"the run ended before: {process.communicate()[1]}")

    def owner(self):
        """Who holds the folder; a killed process is still named, until another one comes."""
        try:
            return json.loads((self.out / ".owner").read_text())["pid"]
        except FileNotFoundError:
            return None

    def pace(self):
        """Seconds between cells."""
        written = sorted(moment for _, moment in self.cells().values())
        return (written[-1] - written[0]) / 1e9 / (len(written) - 1)

    def answers(self):
        """What all cells say beside times."""
        return [without_times(cell) for cell in read_results(self.out)[1]]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    shipped = load_plan("smoke").to_dict()
    names = ("model", "tasks", "keep_ratios", "controls")
    small = {name: shipped[name] for name in names} | {"questions": 4}
    small["methods"] = [one for one in shipped["methods"] if one in METHODS]
    small["timing"] = {"batch": 2, "rounds": 2, "repeats": 1, "decode_tokens": 1}
    path = tmp_path_factory.mktemp("plan") / "small.yaml"
    path.write_text(yaml.safe_dump(small))
    return path


@pytest.fixture(scope="module")
def undisturbed(plan, tmp_path_factory):
    bench = Bench(plan, tmp_path_factory.mktemp("undisturbed") / "out")
    assert bench.finish() == (0, "")
    assert len(bench.cells()) == CELLS
    return bench


@pytest.fixture
def bench(plan, tmp_path):
    return Bench(plan, tmp_path / "out")


def assert_whole(bench, undisturbed, before):
    """Run to the end: what was there is untouched, and the rest is as without a disturbance."""
    assert bench.finish() == (0, "")
    assert before.items() <= bench.cells().items()
    assert bench.answers() == undisturbed.answers()
    assert sorted(p.name for p in bench.out.iterdir()) == sorted(
        p.name for p in undisturbed.out.iterdir()
    )
    assert {p.suffix for p in (bench.out / "cells").iterdir()} == {".json"}


def test_ten_kills_at_drawn_moments(bench, undisturbed):
    draw, done = random.Random(15), {}
    more = [None, 0, 0, 0, 0, 0, 1, 1, 1, 1]  # cells before the kill; None is while it starts
    draw.shuffle(more)
    for wanted in more:
        process = bench.start()
        if wanted is not None:
            bench.wait(process, cells=len(done) + wanted)
        time.sleep(draw.uniform(0, undisturbed.pace()))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        now = bench.cells()
        assert done.items() <= now.items()
        if (bench.out / MANIFEST).exists():
            assert len(read_results(bench.out)[1]) == len(now)
        done = now
    assert 4 <= len(done) < CELLS
    assert_whole(bench, undisturbed, done)


def test_a_disk_that_is_full_from_the_start(bench):
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    code, said = bench.finish(preexec_fn=full)
    assert code == 2
    assert f"cannot write {bench.out / MANIFEST}: File too large" in said
    assert not bench.cells()
    assert not list(bench.out.rglob("*.json*"))


@pytest.mark.parametrize("room", [0, 1000])
def test_a_disk_that_fills_up(bench, undisturbed, room):
    """`room` is what a file may still have: none of it, or a part of a cell."""
    process = bench.start()
    bench.wait(process, cells=2 + room // 1000)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, room))
    said = process.communicate()[1]
    assert process.returncode == 2
    assert "File too large. Finished cells are safe" in said
    assert "Traceback" not in said
    done = bench.cells()
    assert 2 <= len(done) < CELLS
    assert not list(bench.out.rglob("*.tmp"))
    assert_whole(bench, undisturbed, done)


def test_a_read_only_folder(bench, undisturbed):
    process = bench.start(ORDINARY)
    bench.wait(process, cells=2)
    folders = [bench.out / "cells", bench.out]
    try:
        for folder in folders:
            folder.chmod(0o555)
        said = process.communicate()[1]
        assert process.returncode == 2
        assert "Permission denied. Finished cells are safe" in said
        assert "Traceback" not in said
        done = bench.cells()
        assert 2 <= len(done) < CELLS
        code, said = bench.finish(ORDINARY)
        assert (code, bench.cells()) == (2, done)
        assert "Permission denied" in said
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert_whole(bench, undisturbed, done)


def test_a_parent_that_is_a_file(bench):
    """What no right can make a folder."""
    bench.out.write_text("")
    code, said = Bench(bench.plan, bench.out / "results").finish()
    assert code == 2
    assert "cannot make the folder" in said
    assert bench.out.read_text() == ""


def test_power_loss_leaves_files_of_nothing(bench, undisturbed):
    """A disk may keep a name and lose what was written: such cells are made anew, no others."""
    shutil.copytree(undisturbed.out, bench.out)
    done = bench.cells()
    lost = random.Random(15).sample(sorted(done), 3)
    for key, left in zip(lost, (b"", b"\0" * 4096, done[lost[2]][0][:900]), strict=True):
        (bench.out / "cells" / f"{key}.json").write_bytes(left)
    (bench.out / MANIFEST).write_bytes(b"\0" * 4096)
    assert_whole(bench, undisturbed, {key: done[key] for key in done if key not in lost})


def test_a_clock_that_goes_back(bench, undisturbed):
    shutil.copytree(undisturbed.out, bench.out)
    for key in sorted(bench.cells())[: CELLS // 2]:
        (bench.out / "cells" / f"{key}.json").unlink()
    future = time.time() + 1e8
    for path in bench.out.rglob("*.json"):
        os.utime(path, (future, future))
    done = bench.cells()
    assert bench.finish(CLOCK) == (0, "")
    manifest, cells = read_results(bench.out)
    ends = [cell["finished"] for cell in cells]
    assert min(ends) < manifest["created"] < max(ends)
    page = write_page(bench.out, pictures=False).read_text()
    assert "cells were finished before the run began" in page
    (bench.out / "report.html").unlink()
    costs = [cell["cost"] for cell in cells]
    assert all(cost["prefill_ms"]["p20"] > 0 for cost in costs)
    assert_whole(bench, undisturbed, done)
    assert json.loads((bench.out / MANIFEST).read_text()) == manifest
