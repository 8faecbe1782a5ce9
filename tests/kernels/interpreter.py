"""Triton's interpreter in half of its time, which it spends on replacing what it has replaced."""

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
