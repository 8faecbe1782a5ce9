"""VLMEvalKit's launcher on two processes, against a stub of the interface that it is written for.

The stub has what `run.py` of VLMEvalKit does with several processes: each builds the registered
model, answers every other question, and the first puts the files of all together.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_checkpoints import picture, save_checkpoint

ROOT = Path(__file__).parents[1]
STUB = {
    "__init__.py": "",
    "config.py": "supported_VLM = {}\n",
    "vlm/__init__.py": "",
    "vlm/base.py": """
class BaseModel:
    def generate(self, message, dataset=None):
        return self.generate_inner(message, dataset)
""",
}
RUN_PY = """
import argparse, json, os
from pathlib import Path
import torch.distributed as dist
from vlmeval.config import supported_VLM

parser = argparse.ArgumentParser()
for name in ("model", "data", "work-dir"):
    parser.add_argument(f"--{name}")
given = parser.parse_args()
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
questions = json.loads(Path(given.data).read_text())
model, found = supported_VLM[given.model](), {}
for number in range(rank, len(questions), world):
    text, image = questions[number]
    message = [{"type": "image", "value": image}, {"type": "text", "value": text}]
    found[number] = model.generate(message, dataset="stub")
folder = Path(given.work_dir)
(folder / f"{rank}{world}_{given.model}.json").write_text(json.dumps(found))
if world > 1:
    dist.barrier()
if rank == 0:
    whole = {}
    for other in range(world):
        whole |= json.loads((folder / f"{other}{world}_{given.model}.json").read_text())
    (folder / "answers.json").write_text(json.dumps(whole, sort_keys=True))
if world > 1:
    dist.destroy_process_group()
"""


@pytest.fixture
def kit(tmp_path):
    """The stub's folder, and a file of five questions."""
    for name, text in STUB.items():
        path = tmp_path / "kit" / "vlmeval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "kit" / "run.py").write_text(RUN_PY)
    questions = []
    for number, size in enumerate([(40, 60), (100, 50), (64, 64), (30, 90), (80, 80)]):
        picture(*size, number).save(path := tmp_path / f"{number}.png")
        questions.append((f"What is in {number}?", str(path)))
    data = tmp_path / "questions.json"
    data.write_text(json.dumps(questions))
    return tmp_path / "kit", data


def answers(kit, model, out, world):
    """Answers by question of so many processes, and what they say of kept tokens."""
    folder, data = kit
    out.mkdir()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    words = ["--model", str(model), "--method", "divprune", "--num-tokens", "4", "--device", "cpu"]
    words += ["--dtype", "fp32", "--max-new-tokens", "4", "--run", str(folder / "run.py")]
    words += ["--", "--data", str(data), "--work-dir", str(out)]
    paths = os.pathsep.join([str(folder), *(str(ROOT / part) for part in ("src", "kernels"))])
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "vispress.integrations.vlmevalkit", *words],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    told = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, told
    return json.loads((out / "answers.json").read_text()), told


@pytest.mark.full
def test_two_processes_answer_what_one_does(kit, tmp_path):
    model = save_checkpoint("llava", tmp_path / "llava")
    one, (whole,) = answers(kit, model, tmp_path / "one", 1)
    two, (first, second) = answers(kit, model, tmp_path / "two", 2)
    assert [*one] == [str(number) for number in range(5)]
    assert two == one
    for told, prompts in ((whole, 5), (first, 3), (second, 2)):
        assert f"{prompts} prompts; a prompt:" in told
        assert "kept_at_end 4" in told
