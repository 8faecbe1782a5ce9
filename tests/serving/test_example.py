"""The example serves the shipped model with and without compression, to the same answer."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_vllm.py"


def test_the_example_runs() -> None:
    ran = subprocess.run(
        [sys.executable, str(EXAMPLE), "--requests", "2"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    tokens = [int(n) for n in re.findall(r"(\d+) tokens a prompt, \d", ran.stdout)]
    assert len(tokens) == 2
    assert tokens[0] - tokens[1] == 144 - 36
