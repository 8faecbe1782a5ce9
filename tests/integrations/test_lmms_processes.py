"""lmms-eval on two CPU processes with a compressed model: what one process answers and keeps."""

import json
import os
import socket
import subprocess
import sys

import pytest
from tests.integrations.test_lmms_eval import TASK, UTILS, arguments
from tests.tiny_checkpoints import picture

RUN = """
import sys
import tests.integrations.conftest  # torchvision beside a torch without CUDA
from lmms_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    lines = []
    for number, size in enumerate([(40, 60), (100, 50), (64, 64), (30, 90), (80, 80)]):
        picture(*size, number).save(path := folder / f"{number}.png")
        row = {"question": f"What is in {number}?", "answer": "red", "image": str(path)}
        lines.append(json.dumps(row) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "local_vqa.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    (folder / "utils.py").write_text(UTILS)
    return folder


def evaluate(task, given, out, world):
    """Answers by question, and the averages that are reported, of so many processes."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    words = ["--model", "vispress_llava_hf", "--model_args", given, "--tasks", "local_vqa"]
    words += ["--device", "cpu", "--include_path", str(task), "--output_path", str(out)]
    words += ["--batch_size", "1", "--log_samples"]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, *words],
            env=os.environ | (shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    told = [process.communicate(timeout=500)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, told
    (results,) = out.rglob("*_results.json")
    (samples,) = out.rglob("*_samples_local_vqa.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    answers = {row["doc_id"]: row["filtered_resps"] for row in rows}
    return answers, json.loads(results.read_text())


def test_two_processes_answer_what_one_does(folders, task, tmp_path):
    given = arguments(folders["llava"], "llava", method="divprune", num_tokens=4)
    one, whole = evaluate(task, given, tmp_path / "one", 1)
    two, shared = evaluate(task, given, tmp_path / "two", 2)
    assert set(one) == set(range(5))
    assert two == one
    for results in (whole, shared):
        assert results["throughput"]["avg_kept_at_end"] == 4
    assert shared["results"] == whole["results"]
