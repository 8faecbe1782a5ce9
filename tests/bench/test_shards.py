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
from accelerate import dispatch_model
from filelock import FileLock
from tests.bench.stored import manifest_of
from tests.bench.test_engine import results, stored
from tests.tiny_checkpoints import save_checkpoint

from vispress.bench.results import shards
from vispress.bench.results.files import ResultsError
from vispress.bench.results.opening import open_results
from vispress.bench.results.shards import Shard, this_shard
from vispress.bench.results.store import ResultsFolder
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


@pytest.mark.slow
def test_a_model_that_accelerate_spreads_gives_the_same_cells(
    make_plan, tmp_path, meeting, monkeypatch
):
    """Two processes whose models are spread over this CPU and a folder, as a device map says."""
    model = save_checkpoint("llava", tmp_path / "llava")
    plan, out = make_plan(model=str(model), methods=["fastv"]), tmp_path / "two"
    run(plan, tmp_path / "one")
    load, asked = engine.load_named_model, []

    def spread(name, device, dtype):
        asked.append(device)
        loaded = load(name, device, dtype)
        places = dict.fromkeys(("model.vision_tower", "model.multi_modal_projector"), "cpu")
        decoder = loaded.model.model.language_model
        for part, _ in decoder.named_children():
            places[f"model.language_model.{part}"] = "cpu"
        del places["model.language_model.layers"]
        for number in range(len(decoder.layers)):
            places[f"model.language_model.layers.{number}"] = ("cpu", "disk")[number % 2]
        places["lm_head"] = "cpu"
        folder = tmp_path / f"offloaded{len(asked)}"
        dispatch_model(loaded.model, places, main_device="cpu", offload_dir=folder)
        assert decoder.layers[1].self_attn.q_proj.weight.is_meta
        return loaded

    monkeypatch.setattr(engine, "load_named_model", spread)
    shards = [Shard(rank, 2, rank) for rank in (0, 1)]
    calls = [lambda shard=shard: run(plan, out, shard=shard, device="auto") for shard in shards]
    assert together(*calls) == [None, None]
    assert asked == ["auto", "auto"]
    assert results(out) == results(tmp_path / "one")


def test_processes_of_one_machine_do_not_all_take_its_devices(monkeypatch):
    given = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **ADDRESS}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert this_shard(given).device("auto") == "auto"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(ConfigError, match=r"all 8 GPUs of a machine.* 2 processes"):
        this_shard(given).device("auto")
    assert this_shard({**given, "LOCAL_WORLD_SIZE": "1"}).device("auto") == "auto"
    assert this_shard(given).device("cuda") == "cuda:1"


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


@pytest.fixture
def small_parts(monkeypatch):
    """Four questions of two tasks in batches of two: four batches, a part each."""
    monkeypatch.setattr("vispress.bench.run.parts.QUESTIONS", 2)


@pytest.mark.slow
def test_parts_of_cells_are_shared_out_and_give_the_cells_of_one(
    make_plan, tmp_path, meeting, monkeypatch, small_parts
):
    plan = make_plan(batch_size=2, questions=4, methods=[])  # one cell
    monkeypatch.setattr("vispress.bench.run.parts.QUESTIONS", 10**6)
    run(plan, tmp_path / "one")
    monkeypatch.setattr("vispress.bench.run.parts.QUESTIONS", 2)
    ran, both = [], threading.Barrier(2, timeout=60)
    original = engine.answer_part

    def watched(*arguments):
        me, batches = threading.get_ident(), arguments[4]
        if me not in {who for who, _ in ran}:
            ran.append((me, tuple((batch.task, batch.places) for batch in batches)))
            both.wait()  # each has a part in its hands
        else:
            ran.append((me, tuple((batch.task, batch.places) for batch in batches)))
        return original(*arguments)

    monkeypatch.setattr(engine, "answer_part", watched)
    out, counted = tmp_path / "two", [[], []]

    def process(rank):
        mine = counted[rank]
        return lambda: run(
            plan, out, shard=Shard(rank, 2, rank), advance=lambda _, number: mine.append(number)
        )

    assert together(process(0), process(1)) == [None, None]
    assert len({part for _, part in ran}) == len(ran) == 4  # none twice
    assert len({who for who, _ in ran}) == 2
    assert results(out) == results(tmp_path / "one")
    assert not list((out / ".parts").glob("*"))
    total = len(plan.cells()) * plan.questions * len(plan.tasks)
    assert [sum(numbers) for numbers in counted] == [total, total]


@pytest.mark.slow
def test_a_stopped_run_keeps_its_parts_and_makes_damaged_ones_anew(
    make_plan, tmp_path, monkeypatch, small_parts
):
    plan = make_plan(batch_size=2, questions=4, methods=["divprune"], controls="none")
    original, ran = engine.answer_part, []

    def stops(*arguments):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(arguments[1].key)
        return original(*arguments)

    monkeypatch.setattr(engine, "answer_part", stops)
    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "r")
    parts = sorted((tmp_path / "r" / ".parts").glob("*"))
    assert len(parts) == 3
    data = json.loads(parts[0].read_text())
    data["batches"][0]["answers"] = data["batches"][0]["answers"][:1]
    parts[0].write_text(json.dumps(data))
    parts[1].write_text(parts[1].read_text()[:-40])
    again = []
    monkeypatch.setattr(engine, "answer_part", lambda *a: (again.append(a[1].key), original(*a))[1])
    run(plan, tmp_path / "r")
    assert again.count("none") == 3  # two damaged, one missing
    run(plan, tmp_path / "one")
    assert results(tmp_path / "r") == results(tmp_path / "one")


@pytest.mark.slow
def test_runs_that_share_a_folder_need_no_launcher(make_plan, tmp_path, meeting, small_parts):
    plan = make_plan(batch_size=2, questions=4, methods=["divprune"])
    out = tmp_path / "r"
    assert together(*[lambda: run(plan, out, share=True)] * 2) == [None, None]
    run(plan, tmp_path / "one")
    assert results(out) == results(tmp_path / "one")
    assert not list(out.glob(".lock-*"))
    run(plan, out, share=True)  # alone, and nothing is left to do
    run(plan, out)


def test_who_shares_and_who_does_not_keep_out_of_each_others_way(tmp_path, monkeypatch):
    monkeypatch.setattr("vispress.bench.results.locks._GATE", 0.1)
    with open_results(tmp_path, IDENTITY, MANIFEST, share=True):
        with open_results(tmp_path, IDENTITY, MANIFEST, share=True):
            pass
        with pytest.raises(ResultsError, match="another run holds"):
            open_results(tmp_path, IDENTITY, MANIFEST).__enter__()
        other = IDENTITY | {"commit": "d"}
        for force in (False, True):
            with pytest.raises(ResultsError, match="other processes are at it"):
                open_results(tmp_path, other, MANIFEST, share=True, force=force).__enter__()
    with open_results(tmp_path, IDENTITY, MANIFEST):  # noqa: SIM117
        with pytest.raises(ResultsError, match="another run holds"):
            open_results(tmp_path, IDENTITY, MANIFEST, share=True).__enter__()
    with pytest.raises(ResultsError, match="leave --share out"):
        open_results(tmp_path, IDENTITY, MANIFEST, share=True, shard=Shard(0, 2, 0)).__enter__()
    # one that was killed holds nothing
    (tmp_path / ".lock-gone-1-2").touch()
    with open_results(tmp_path, IDENTITY, MANIFEST, share=True):
        assert len(list(tmp_path.glob(".lock-*"))) == 1
