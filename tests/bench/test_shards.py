"""One run on several processes: the same cells as one, a dead process loses nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml
from filelock import FileLock
from tests.bench.stored import manifest_of
from tests.bench.test_engine import results, stored

from vispress.bench.results import shards
from vispress.bench.results.files import ResultsError
from vispress.bench.results.shards import Shard, this_shard
from vispress.bench.results.store import ResultsFolder, open_results
from vispress.bench.run import engine
from vispress.bench.run.engine import run
from vispress.errors import ConfigError

MANIFEST = manifest_of()
IDENTITY = MANIFEST.pop("identity")
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}

RUN = """
import sys
from vispress.bench.run.engine import run
from vispress.bench.plan.plan import load_plan
run(load_plan(sys.argv[1]), sys.argv[2], advance=lambda what, _: print(what, flush=True))
"""


@pytest.fixture
def meeting(monkeypatch):
    """Threads of this process stand for processes: each its own place in a shared store."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(shards, "_store", lambda _: store)
    monkeypatch.setattr(shards, "_MEETINGS", _Always())
    one_at_a_time, load = threading.Lock(), engine.load_named_model

    def loaded(*arguments):
        with one_at_a_time:  # transformers loads through module-wide state
            return load(*arguments)

    monkeypatch.setattr(engine, "load_named_model", loaded)


class _Always:
    def __next__(self):
        return 0


def together(*calls):
    """Run in threads; what each returned or raised."""
    found = [None] * len(calls)

    def one(number):
        try:
            found[number] = calls[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
        assert not thread.is_alive()
    return found


@pytest.mark.slow
def test_two_give_the_cells_of_one(make_plan, tmp_path, meeting, monkeypatch):
    plan = make_plan()
    run(plan, tmp_path / "one")
    ran = []
    original = engine.run_cell
    monkeypatch.setattr(engine, "run_cell", lambda *a: (ran.append(a[1].key), original(*a))[1])
    out, counted = tmp_path / "two", [[], []]

    def process(rank):
        shard, mine = Shard(rank, 2, rank), counted[rank]
        return lambda: run(plan, out, shard=shard, advance=lambda _, number: mine.append(number))

    assert together(process(0), process(1)) == [None, None]
    assert sorted(ran) == sorted(cell.key for cell in plan.cells())  # none twice
    assert results(out) == results(tmp_path / "one")
    for key, path in stored(out).items():
        ours, theirs = (json.loads(p.read_text()) for p in (path, stored(tmp_path / "one")[key]))
        for timed in ("finished", "provenance"):
            ours.pop(timed), theirs.pop(timed)
        assert ours == theirs
    total = len(plan.cells()) * plan.questions * len(plan.tasks)
    assert [sum(numbers) for numbers in counted] == [total, total]
    # another run on the folder finds everything done, and no process holds it
    run(plan, out)


def test_a_foreign_folder_is_refused_by_all(make_plan, tmp_path, meeting):
    run(make_plan(seed=5, methods=[], tasks=["count"]), tmp_path)
    calls = [lambda r=r: run(make_plan(), tmp_path, shard=Shard(r, 2, r)) for r in (0, 1)]
    for error in together(*calls):
        assert isinstance(error, ResultsError)
        assert "results of another run: plan" in str(error)


def test_processes_of_different_plans_do_not_mix(tmp_path, meeting):
    def process(rank, identity):
        def call():
            with open_results(tmp_path, identity, MANIFEST, shard=Shard(rank, 2, rank)):
                return "in"

        return call

    found = together(process(0, IDENTITY), process(1, IDENTITY | {"commit": "d"}))
    assert found[0] == "in"
    assert isinstance(found[1], ResultsError)
    assert "process 1 does not find the run of process 0" in str(found[1])


def test_a_claimed_cell_is_left_to_its_process(tmp_path):
    ours, theirs = (ResultsFolder(tmp_path, MANIFEST, shared=True) for _ in range(2))
    with ours.claimed("a", wait=False) as mine:
        assert mine
        with theirs.claimed("a", wait=False) as also:
            assert not also
        with theirs.claimed("b", wait=False) as other:
            assert other
    with theirs.claimed("a", wait=True) as after:
        assert after


def test_an_orphan_of_a_killed_run_holds_the_folder(tmp_path):
    """The first process is gone; another one still writes its cell."""
    with open_results(tmp_path, IDENTITY, MANIFEST):
        pass
    orphan = FileLock(tmp_path / ".lock-1")
    orphan.acquire()
    try:
        with pytest.raises(ResultsError, match="another run holds"):
            open_results(tmp_path, IDENTITY, MANIFEST).__enter__()
    finally:
        orphan.release()
    with open_results(tmp_path, IDENTITY, MANIFEST):
        pass


def test_launchers_are_understood():
    assert this_shard({}) == Shard()
    assert this_shard({"WORLD_SIZE": "1", "RANK": "0"}) == Shard()
    given = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", **ADDRESS}
    assert this_shard(given) == Shard(3, 4, 1)
    assert this_shard(given).device("cuda") == "cuda:1"
    assert this_shard(given).device("cpu") == "cpu"
    assert Shard().device("cuda") == "cuda"
    assert this_shard({"WORLD_SIZE": "2", "RANK": "1", **ADDRESS}) == Shard(1, 2, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"MASTER_PORT": None}, "MASTER_PORT is not set; start them with accelerate"),
        ({"RANK": "first"}, "must be integers.*first"),
        ({"RANK": "2"}, r"RANK must be in \[0, 2\), got 2"),
    ],
)
def test_half_a_launcher_is_named(change, words):
    given = {"WORLD_SIZE": "2", "RANK": "0", **ADDRESS} | change
    with pytest.raises(ConfigError, match=words):
        this_shard({name: value for name, value in given.items() if value is not None})


def test_a_process_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(shards, "_store", _refused)
    with pytest.raises(ConfigError, match=r"did not meet at .*first error of another process"):
        Shard(1, 2, 1).hear()


def _refused(_):
    raise torch.distributed.DistNetworkError("refused")


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.full
def test_real_processes_go_on_without_one_that_is_killed(make_plan, tmp_path):
    plan = make_plan(questions=8)
    file, out = tmp_path / "plan.yaml", tmp_path / "two"
    names = ("model", "questions", "max_new_tokens", "controls")
    small = {name: getattr(plan, name) for name in names}
    small |= {"tasks": list(plan.tasks), "methods": [*plan.methods], "keep_ratios": [0.5]}
    file.write_text(yaml.safe_dump(small | {"timing": {"batch": 0}}))
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(file), str(out)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        # killed in the middle of its first cell, with the claim in its hands
        for line in processes[1].stdout:
            if ", " in line:
                processes[1].send_signal(signal.SIGKILL)
                break
        end = time.monotonic() + 300
        while processes[0].poll() is None and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
    assert processes[0].returncode == 0
    run(plan, tmp_path / "one")
    assert results(out) == results(tmp_path / "one")
