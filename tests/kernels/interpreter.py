"""Triton's interpreter in half of its time, and with products as a GPU computes them."""

from types import FunctionType
from typing import Any

import pytest


def replace_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what is in `triton.language` once a launch for each module that calls it.

    Triton does so at every call of one jitted function by another, thousands of times a launch,
    with the same outcome.
    """
    from triton.runtime import interpreter

    launch, replace = interpreter.GridExecutor.__call__, interpreter._patch_lang
    done: set[int] = set()  # globals of functions, in the launch under way

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        done.clear()
        launch(self, *args, **kwargs)

    def replace_once(function: FunctionType) -> Any:
        known = id(function.__globals__)
        if known in done:
            return interpreter._LangPatchScope()  # the first of the launch restores everything
        done.add(known)
        return replace(function)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
    monkeypatch.setattr(interpreter, "_patch_lang", replace_once)


def multiply_alike_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a product's element depend on its row and column alone, not on their place in a tile.

    So it is on a GPU, whose units add along k in one order. NumPy's BLAS rounds elements at a
    tile's edge otherwise than those inside, on some processors: two passes over other tiles would
    see other logits. In fp64 the order matters too little to survive rounding to fp32.
    """
    import numpy as np
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if {a.data.dtype, b.data.dtype, d.data.dtype} != {np.dtype(np.float32)}:
            return multiply(self, a, b, d, *options)
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
