"""Every kernel compiles to a cubin, without a GPU, and stays within the device's means.

The quick run compiles the usual configurations for capability 9.0; the slow ones compile all that
the launch rules can choose, for 8.0 and 9.0. VISPRESS_COMPILE_REPORT=DIR keeps the numbers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROBE = Path(__file__).with_name("compile_probe.py")
SHARED_LIMIT = 99 * 1024  # capability 8.6 and 8.9; 8.0 and 9.0 have more


def probe(capability, directory, *flags):
    out = Path(os.environ.get("VISPRESS_COMPILE_REPORT", directory)) / f"sm{capability}.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-W", "ignore", str(PROBE), str(out), str(capability), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def check(results):
    errors = {name: r["error"] for name, r in results.items() if "error" in r}
    assert not errors, json.dumps(errors, indent=1)
    spilled = {name: r["stack"] for name, r in results.items() if r["stack"]}
    assert not spilled, json.dumps(spilled, indent=1)
    large = {name: r["shared"] for name, r in results.items() if r["shared"] > SHARED_LIMIT}
    assert not large, json.dumps(large, indent=1)


def test_usual_configurations_compile_without_spills(tmp_path):
    results = probe(90, tmp_path)
    check(results)
    assert len({r["kernel"] for r in results.values()}) == 12


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_configuration_compiles_without_spills(tmp_path, capability):
    check(probe(capability, tmp_path, "--all"))
