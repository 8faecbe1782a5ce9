"""Every kernel compiles to a cubin, without a GPU, and stays within the device's means.

By default one configuration of each kernel is compiled for capability 9.0; `make full` compiles all
that the launch rules can choose, for 8.0 and 9.0. `benchmarks/results/compile` keeps their numbers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROBE = Path(__file__).with_name("compile_probe.py")
RECORDS = Path(__file__).parents[2] / "benchmarks" / "results" / "compile"
SHARED_LIMIT = 99 * 1024  # capability 8.6 and 8.9; 8.0 and 9.0 have more
FEW_BYTES = 32  # the assembler parks a few words to reach a rounder number of registers
KERNELS = 23


def run_apart(*arguments):
    """A process without TRITON_INTERPRET, under which kernels could not be compiled."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(PROBE.parent), *(p for p in sys.path if p)])
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def probe(capability, directory, *flags):
    out = directory / f"sm{capability}.json"
    run_apart(str(PROBE), str(out), str(capability), *flags)
    return json.loads(out.read_text())["variants"]


def check(results):
    errors = {name: r["error"] for name, r in results.items() if "error" in r}
    assert not errors, json.dumps(errors, indent=1)
    # strides other than 1 need an address an element: what spills there is recorded, not refused
    spilled = {n: r["stack"] for n, r in results.items() if r["even"] and r["stack"] > FEW_BYTES}
    assert not spilled, json.dumps(spilled, indent=1)
    narrow = {name: r["narrow"] for name, r in results.items() if r["narrow"]}
    assert not narrow, json.dumps(narrow, indent=1)
    large = {name: r["shared"] for name, r in results.items() if r["shared"] > SHARED_LIMIT}
    assert not large, json.dumps(large, indent=1)
    assert len({r["kernel"] for r in results.values()}) == KERNELS


@pytest.mark.slow
def test_every_kernel_compiles_without_spills(tmp_path):
    check(probe(90, tmp_path, "--even", "--one"))


@pytest.mark.full
def test_usual_configurations_compile_without_spills(tmp_path):
    check(probe(90, tmp_path))


@pytest.mark.full
@pytest.mark.parametrize(
    # odd strides change what stands before the code for a capability is made: once is enough
    ("capability", "flags"),
    [(80, ("--all", "--even")), (90, ("--all",))],
)
def test_every_configuration_compiles_without_spills(tmp_path, capability, flags):
    check(probe(capability, tmp_path, *flags))


@pytest.fixture(scope="module")
def variants():
    """Names of all variants, and of what the launch rules choose beside them."""
    code = "import json, compile_reach as r, compile_variants as v"
    code += "; print(json.dumps([[one.name for one in v.variants()], r.missing()]))"
    return json.loads(run_apart("-c", code))


@pytest.mark.slow
def test_the_variants_hold_every_choice_of_the_launch_rules(variants):
    names, missing = variants
    assert names
    assert missing == []


@pytest.mark.parametrize(
    "broken",
    [
        {"error": "CompilationError"},
        {"stack": FEW_BYTES + 8},
        {"shared": SHARED_LIMIT + 1},
        {"narrow": ["%1 = arith.muli"]},
        {"kernel": "another"},
    ],
    ids=lambda broken: next(iter(broken)),
)
def test_each_limit_can_fail(broken):
    results = json.loads((RECORDS / "sm80.json").read_text())["variants"]
    even = next(name for name, result in results.items() if result["even"])
    with pytest.raises(AssertionError):
        check(results | {even: results[even] | broken})


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize("capability", [80, 90])
def test_the_record_holds_every_configuration(variants, capability):
    recorded = json.loads((RECORDS / f"sm{capability}.json").read_text())
    assert recorded["capability"] == capability
    assert list(recorded["variants"]) == variants[0]
    check(recorded["variants"])
