"""How many tensor operations a method adds to a prefill: on a GPU each costs the host a launch.

A prefill of one image in one sample, where the host is what limits. Views launch nothing and are
left out, and so is what runs inside `vispress_kernels`, where CUDA has a launch or two in place of
a reference.
`calls.json` keeps what was measured; a method may add a tenth more, and less is welcome:

    python -m tests.laws.test_calls [METHOD ...]
"""

import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.cases import CASES, GISTS, cases, logits_of, model_of, settings
from tests.tiny import Image, Sample, Text, gist_tokens, make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from vispress import compressed

RECORD = Path(__file__).with_name("calls.json")
OURS = [(family, method) for family, method in CASES if family in ("llava", "qwen2_5_vl")]
SPARE = 5


class Calls(TorchDispatchMode):
    """Counts operations outside the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not in_kernels():
            self.count += 1
        return func(*args, **(kwargs or {}))


def in_kernels() -> bool:
    """Whether an op of `vispress_kernels` is being computed; its plain helpers are none."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/vispress_kernels/" in name and not name.endswith("/products.py"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def calls(run: Callable[[], Any]) -> int:
    """Operations of a call, what is made once left out."""
    run()
    with Calls() as seen:
        run()
    return seen.count


def inputs_of(family: str) -> dict[str, Any]:
    """One image between texts."""
    sample = Sample([Text(5), Image(8, 8), Text(7)])
    return make_inputs(family, [sample], dtype=torch.float32)


@cache
def untouched(family: str) -> int:
    """Operations of a prefill that nothing compresses."""
    return calls(lambda: logits_of(model_of(family, torch.float32), inputs_of(family)))


def added(family: str, method: str) -> int:
    """Operations that a compressed prefill has beyond those of an untouched one."""
    model, plain = model_of(family, torch.float32), untouched(family)
    with compressed(model, method, **settings(family, method)), gist_tokens(int(method in GISTS)):
        inputs = inputs_of(family)
        return calls(lambda: logits_of(model, inputs)) - plain


@pytest.mark.parametrize(("family", "method"), cases("calls", OURS, every_method=True))
def test_a_method_asks_for_no_more_than_before(family: str, method: str) -> None:
    known = json.loads(RECORD.read_text())[family]
    assert method in known, f"run `python -m tests.laws.test_calls {method}`"
    assert added(family, method) <= 1.1 * known[method] + SPARE


def main(names: Sequence[str]) -> None:
    """Measure some methods, or all, and keep it."""
    known = json.loads(RECORD.read_text())
    found: dict[str, dict[str, int]] = {}
    for family, method in OURS:
        if not names or method in names:
            found.setdefault(family, {})[method] = added(family, method)
        elif method in known[family]:
            found.setdefault(family, {})[method] = known[family][method]
    RECORD.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
