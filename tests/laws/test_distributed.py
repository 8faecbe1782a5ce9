"""Two processes give what one gives: tensor parallelism, DDP and FSDP2, by gloo on CPUs.

The cases are in `ranks`; a pair of processes runs all of a suite, because torch takes seconds to
start. By default it is one that has every fourth case of the others.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.laws.ranks import RANKS
from tests.tiny import build

from vispress import compress_model
from vispress.errors import UnsupportedModelError

MINUTES = 8
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(
    "suite",
    [
        pytest.param("tensor_parallel", marks=pytest.mark.full),
        pytest.param("data_parallel", marks=pytest.mark.full),
        pytest.param("spread", marks=pytest.mark.full),  # and in CI
    ],
)
def test_two_processes_equal_one(suite: str, tmp_path: Path) -> None:
    run_suite(suite, tmp_path, least=6 if suite == "spread" else 12)


def run_suite(suite: str, tmp_path: Path, least: int = 12) -> None:
    """Run a suite of some cases or more in two processes, and read what each found."""
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(RANKS)}
    world |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ranks = []
    for rank in range(RANKS):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": paths}
        log = (tmp_path / f"{rank}.log").open("w")
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.laws.ranks", suite, str(tmp_path)],
                env=os.environ | world | own,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
        )
    try:
        codes = [process.wait(timeout=60 * MINUTES) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, code in enumerate(codes):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        failed = "\n\n".join(f"{name}\n{why}" for name, why in found.items() if why)
        assert not failed, f"rank {rank}, {len(found)} cases run\n{failed}"
        assert code == 0, (tmp_path / f"{rank}.log").read_text()[-3000:]
        assert len(found) >= least


def test_zero_3_is_refused_by_name_at_compress_model_and_at_the_call() -> None:
    """DeepSpeed is no dependency: what it leaves on a parameter that it has cut tells."""
    model = build("llava", dtype=torch.float32)
    weight = model.model.language_model.norm.weight
    weight.ds_id, weight.ds_tensor = 0, SimpleNamespace()  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedModelError, match=r"ZeRO-3.*fully_shard"):
        compress_model(model, "fastv", keep_ratio=0.5)
    del weight.ds_id, weight.ds_tensor
    compress_model(model, "fastv", keep_ratio=0.5)
    weight.ds_id, weight.ds_tensor = 0, SimpleNamespace()  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedModelError, match=r"ZeRO-3.*fully_shard"):
        model(input_ids=torch.full((1, 4), 9))
