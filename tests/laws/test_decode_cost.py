"""A decode step on a growing cache costs what the untouched model's does, within a few calls.

Counted at the depth of a 7B model, where a call a layer is what makes a step slow; most of a step
at batch 1 is the host's. `benchmarks/results/decode_cost.txt` keeps what this prints:

    python -m tests.laws.test_decode_cost
"""

import cProfile
import pstats
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tests.laws.test_calls import Calls
from tests.tiny import Image, Sample, Text, Video, build, make_inputs
from transformers.cache_utils import DynamicCache

from vispress import compressed
from vispress.runtime.kv_cache.hf_compat import CACHE

DEPTH = 32
METHODS: dict[str, dict[str, Any]] = {
    "divprune": {"keep_ratio": 0.5},  # closes the gaps in position ids
    "visionzip": {"keep_ratio": 0.5},
    "fastv": {"keep_ratio": 0.5},
    "pyramiddrop": {},
    "sparsevlm": {"keep_ratio": 0.5},
    "random": {"keep_ratio": 0.5},
}
PYTHON, OPERATIONS = 0.05, 2
"""What a step may cost more: a share of the untouched step's Python calls, and operations."""
CHOOSING = {"cmai": "llava", "dycoke": "llava_onevision"}
"""Methods that choose at each step, and a family that has what they compress."""
OLD = Version(transformers.__version__) < Version("5.24")
"""Whether an untouched step makes a tenth fewer calls, which what is added does not."""
CHOICE, A_LAYER, PADDED = 0.16 if OLD else 0.15, 17, 4
"""A share of Python calls for these. CMAI reads each of its layers, where its definition takes so
many operations (the row of attention, what rows before it saw, the focus, the smallest set that has
its mass, the mask), and more where a mask hides padding."""


@cache
def deep(family: str) -> Any:
    """A model of 32 decoder layers."""
    return build(family, layers=DEPTH, dtype=torch.float32)


def steps(model: Any, pad: int, family: str) -> Iterator[Callable[[], Any]]:
    """Decode steps behind one prefill, each a call to make."""
    seen = Image(4, 4) if family == "llava" else Video(4, 4, 4)
    samples = [Sample([Text(5), seen, Text(7 + pad)])]
    samples += [Sample([Text(5), seen, Text(7)])] if pad else []
    inputs = make_inputs(family, samples, dtype=torch.float32, padding="left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    held = DynamicCache(config=model.config.text_config)
    model(**inputs, **{CACHE: held}, logits_to_keep=1)
    while True:
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        told = {"attention_mask": mask, "position_ids": mask.cumsum(1)[:, -1:] - 1}
        step = {"input_ids": ids[:, -1:], CACHE: held, "logits_to_keep": 1, **told}
        yield lambda step=step: model(**step)  # type: ignore[misc]


def python_calls(run: Callable[[], Any]) -> int:
    """Calls of functions, built-in ones included."""
    profile = cProfile.Profile()
    profile.enable()
    run()
    profile.disable()
    return sum(entry[0] for entry in pstats.Stats(profile).stats.values())  # type: ignore[attr-defined]


def cost(pad: int, family: str = "llava") -> tuple[int, int]:
    """Operations and Python calls of a step, once places for it are made."""
    with torch.inference_mode():
        series = steps(deep(family), pad, family)
        next(series)()
        with Calls() as seen:
            next(series)()
        return seen.count, python_calls(next(series))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_costs_what_an_untouched_one_does(method: str) -> None:
    operations, python = cost(0)
    with compressed(deep("llava"), method, **METHODS[method]):
        more, slower = cost(0)
    assert more - operations <= OPERATIONS
    assert slower - python <= PYTHON * python


@pytest.mark.parametrize("method", ["divprune", "fastv", "pyramiddrop"])
def test_a_step_of_a_padded_batch_cuts_a_mask_for_each_group(method: str) -> None:
    operations, python = cost(2)
    with compressed(deep("llava"), method, **METHODS[method]):
        more, slower = cost(2)
        groups = 3 if method == "pyramiddrop" else 1
    assert more - operations <= 2 * groups + OPERATIONS
    assert slower - python <= 1.2 * PYTHON * python


@pytest.mark.parametrize("pad", [0, 2])
@pytest.mark.parametrize("method", CHOOSING)
def test_a_step_that_chooses_costs_a_choice_more(method: str, pad: int) -> None:
    operations, python = cost(pad, CHOOSING[method])
    with compressed(deep(CHOOSING[method]), method):
        more, slower = cost(pad, CHOOSING[method])
    each = 24 * (A_LAYER + (PADDED if pad else 0)) if method == "cmai" else 15
    assert more - operations <= each + 25
    assert slower - python <= CHOICE * python


def main() -> None:
    """Print what a step of each method costs more than an untouched one."""
    out = []
    for pad, name in ((0, "one sample"), (2, "two samples, one padded")):
        operations, python = cost(pad)
        out.append(f"{name}: untouched {operations} operations, {python} Python calls a step")
        for method, options in METHODS.items():
            with compressed(deep("llava"), method, **options):
                more, slower = cost(pad)
            out.append(line(method, more - operations, slower - python, python))
        for method, family in CHOOSING.items():
            operations, python = cost(pad, family)
            with compressed(deep(family), method):
                more, slower = cost(pad, family)
            out.append(line(method, more - operations, slower - python, python))
    sys.stdout.write("\n".join(out) + "\n")


def line(method: str, operations: int, calls: int, of: int) -> str:
    """One method's costs."""
    return f"  {method:12} {operations:+4} operations, {calls:+5} calls ({calls / of:+.1%})"


if __name__ == "__main__":
    main()
