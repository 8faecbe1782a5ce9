"""How many binaries of each kernel prompts of any size ask for: each is a compile at run time.

Run by test_binaries.py in a process of its own, because Triton's own rules (which whole numbers are
1, which are multiples of 16) are asked, and kernels decorated under TRITON_INTERPRET have none.
Nothing is compiled and nothing runs. Prints a line of JSON: kernels by name.
"""

import importlib
import json
import os
import pkgutil
import random
import sys
from typing import Any

import torch
from op_cases import MAKERS, make
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import vispress_kernels
from vispress_kernels import _greedy, _products

PROMPTS = 100
WIDTH, HEAD = 4096, 128

binders: dict[str, Any] = {}
binaries: dict[str, set[str]] = {}


def note(kernel: Any, programs: int, *args: Any, on: torch.Tensor, **options: Any) -> None:
    """In place of a launch: the key by which Triton would look the binary up."""
    if not programs:
        return
    name = kernel.__name__
    if name not in binders:
        backend = make_backend(GPUTarget("cuda", 90, 32))
        binders[name] = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialized, more = binders[name](*args, **options)
    binaries.setdefault(name, set()).add(repr((specialized, more)))


def main() -> None:
    """Images of 16 to 2,500 tokens and budgets of a ninth to three quarters of them."""
    modules = [
        importlib.import_module(f"vispress_kernels.{found.name}.kernel")
        for found in pkgutil.iter_modules(vispress_kernels.__path__)
        if found.ispkg
    ]
    for module in (*modules, _greedy, _products):
        module.launch = note  # type: ignore[attr-defined]
    os.environ["TRITON_INTERPRET"] = "1"  # from here on: tensors on the CPU are taken
    drawn = random.Random(0)

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    for _ in range(PROMPTS):
        N = drawn.randint(4, 50) * drawn.randint(4, 50)
        K = max(1, round(N * drawn.choice((1 / 9, 2 / 9, 0.25, 1 / 3, 0.5, 0.75))))
        for op in MAKERS:
            width = HEAD if op.endswith("_attention") else WIDTH
            make(op, tensor, 1, N, K, width, torch.float16).run("triton")
    json.dump({name: len(keys) for name, keys in sorted(binaries.items())}, sys.stdout)


if __name__ == "__main__":
    main()
