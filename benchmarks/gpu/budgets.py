"""The budgets that the papers publish, carried over to images with other counts of tokens."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu.record import ROOT

PUBLISHED_TOKENS = 576
"""Visual tokens of LLaVA-1.5, which the counts in `configs/methods` belong to."""
BY_CONTENT = {"quadtree_merge": {"keep_ratio": 0.25}}
"""Methods whose published setting merges nothing of noise, and the budget that stands in for it."""
IMPORTANT = (
    *("fastv", "divprune", "visionzip", "pyramiddrop", "cdpruner", "sparsevlm", "prumerge"),
    *("vispruner", "dart", "zoo_prune", "fourier", "transprune", "tome", "random", "uniform"),
)
"""What comes first, should the time not suffice."""
CONFIGS: Path = ROOT / "configs" / "methods"


def fitting(crops: int) -> list[str]:
    """Methods for pictures of so many AnyRes crops (1 for a plain one); none for videos."""
    from vispress import list_methods
    from vispress.registry import get_method

    fits = (None, "anyres") if crops > 1 else (None,)
    return [name for name in list_methods() if get_method(name).needs in fits]


def by_importance(methods: Iterable[str]) -> list[str]:
    """Those of `IMPORTANT` in its order, then the others in theirs."""
    place = {name: number for number, name in enumerate(IMPORTANT)}
    return sorted(methods, key=lambda name: place.get(name, len(place)))


@cache
def _published(method: str) -> dict[str, Any]:
    if method in BY_CONTENT:
        return BY_CONTENT[method]
    path = CONFIGS / f"{method}.yaml"
    if not path.exists():
        return {}
    known = yaml.safe_load(path.read_text())
    return {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}


def published(method: str, visual: int, *, has_cls: bool) -> dict[str, Any]:
    """Arguments of `compress_model` for one method, `method` among them.

    Args:
        method: A registered name.
        visual: Visual tokens of an image; counts of tokens are scaled to it.
        has_cls: Whether the encoder has a [CLS] token; else the documented substitute is used.
    """
    options = (_published(method) or {"keep_ratio": 0.25}) | {"method": method}
    for count in ("num_tokens", "contextual"):
        if isinstance(options.get(count), int):
            options[count] = max(1, round(options[count] * visual / PUBLISHED_TOKENS))
    return substituted(options, has_cls=has_cls)


def substituted(options: dict[str, Any], *, has_cls: bool) -> dict[str, Any]:
    """With the documented substitute for [CLS] attention where the encoder has none."""
    from vispress.registry import get_method
    from vispress.types import CLS_SIGNALS

    if parts := options.get("parts"):
        parts = tuple(substituted(dict(part), has_cls=has_cls) for part in parts)
        return options | {"parts": parts}
    needs = CLS_SIGNALS & get_method(options["method"]).reads
    return options | {"scores": "column_mean"} if needs and not has_cls else options


def compressor_of(options: dict[str, Any]) -> Any:
    """The compressor that `compress_model(model, **options)` would make."""
    from vispress.config import make_compressor

    return make_compressor(options["method"], **{k: v for k, v in options.items() if k != "method"})
