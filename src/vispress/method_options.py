"""Compressors from what is given on a command line: names, and `KEY=VALUE` options."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from vispress.bench.plan.cells import BUDGETS, takes_ratio
from vispress.budget import PUBLISHED_DEPTH
from vispress.config import make_compressor
from vispress.errors import BudgetError, ConfigError
from vispress.methods.base import Compressor
from vispress.registry import get_method
from vispress.yaml_files import parse_yaml


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` pairs, values read as YAML.

    Raises:
        ConfigError: A pair has no `=`, or its value is not YAML.
    """
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set needs KEY=VALUE, got {pair!r}")
        values[key] = parse_yaml(text, f"--set {pair!r}")
    return values


def make_all(names: Sequence[str], values: dict[str, Any]) -> list[Compressor]:
    """Compressors of those names, each with the options that it knows.

    A method that takes no budget (`no_image`) is given none.

    Raises:
        UnsupportedMethodError: Unknown method.
        ConfigError: No method knows an option.
        BudgetError: A budget is out of range.
    """
    known = {name: {field.name for field in fields(get_method(name))} for name in names}
    for key in values:
        if not any(key in own for own in known.values()):
            # with one name, make_compressor says which options are valid
            make_compressor(names[0], **{key: values[key]})
    made = []
    for name in names:
        own = {key: value for key, value in values.items() if key in known[name]}
        made.append(_make(name, own))
    return made


def make_budgeted(name: str, values: dict[str, Any], ratio: float) -> Compressor:
    """A compressor that keeps a share of tokens where it has no schedule and is given no budget.

    Args:
        name: Of the method.
        values: Its options.
        ratio: The share.

    Raises:
        UnsupportedMethodError: Unknown method.
        ConfigError: The method does not know an option.
        BudgetError: A budget is out of range.
    """
    (made,) = make_all([name], values)
    try:
        made.placements(PUBLISHED_DEPTH)
    except BudgetError:
        if made.given_budget():
            raise
        (made,) = make_all([name], values | {"keep_ratio": ratio})
    return made


def _make(name: str, values: dict[str, Any]) -> Compressor:
    rest = {key: value for key, value in values.items() if key not in BUDGETS}
    bare = make_compressor(name, **rest)
    return make_compressor(name, **values) if takes_ratio(bare) else bare
