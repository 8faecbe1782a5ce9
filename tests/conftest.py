"""Shared settings of all tests, and which of them run: default, `-m full`, `--quick`."""

import gc
import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any
from zlib import crc32

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    # the same kernel tests run compiled on a GPU, interpreted elsewhere; read when triton is
    # imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
# tiny models: threads cost more than they bring, and workers run side by side
torch.set_num_threads(1)

PLAIN = (str, int, float, type(None))
"""Values of parameters that ids are made of."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="one case of each test function, and no slow one"
    )
    parser.addoption(
        "--by-default", action="store_true", help="a node id asks for no case that is left out"
    )


def asks_for_all(config: pytest.Config) -> bool:
    """Whether `-m full` asks for everything."""
    return bool(re.search(r"\bfull\b", config.option.markexpr))


def named_cases(config: pytest.Config) -> set[str]:
    """Node ids of single cases that are asked for, without their folders."""
    if config.option.by_default:
        return set()
    return {arg.rpartition("/")[2] for arg in config.args if "[" in arg}


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make no items of parameters marked `full` that would be left out: there are 25,000."""
    if asks_for_all(metafunc.config) or named_cases(metafunc.config):
        return
    parametrize = metafunc.parametrize

    def without_full(names: Any, values: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        values = list(values)
        stay = [one for one in values if not is_full(one)]
        if stay and (callable(kwargs.get("ids")) or all(map(names_itself, stay))):
            values = stay
        parametrize(names, values, *args, **kwargs)

    metafunc.parametrize = without_full  # type: ignore[method-assign]


def names_itself(parameters: Any) -> bool:
    """Whether a case's id is made of its values, not of its place among all."""
    found = getattr(parameters, "values", parameters)
    values = found if isinstance(found, tuple) else (found,)
    plain = all(isinstance(one, PLAIN) for one in values)
    return plain or getattr(parameters, "id", None) is not None


def is_full(parameters: Any) -> bool:
    """Whether a value of `parametrize` is marked `full`."""
    return any(mark.name == "full" for mark in getattr(parameters, "marks", ()))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `full`, and most cases of slow tests, unless they are asked for.

    `-m full` asks for everything, a node id for its case.
    """
    if asks_for_all(config):
        for item in items:  # everything, not only what is left out by default
            item.add_marker(pytest.mark.full)
        return
    named = named_cases(config)
    asked = [item for item in items if item.nodeid.rpartition("/")[2] in named]
    stay = [item for item in items if not item.get_closest_marker("full")]
    if config.option.quick:
        stay = some_of_each([x for x in stay if not x.get_closest_marker("slow")], one=True)
    else:
        thinned = [item for item in stay if thins(item)]
        left_out = {*thinned} - {*some_of_each(thinned)}
        stay = [item for item in stay if item not in left_out]
    kept = {*stay, *asked}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over modules and collected tests, which stay to the end."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let it take them again: libraries count what is left at the end."""
    gc.unfreeze()


def thins(item: pytest.Item) -> pytest.Mark | None:
    """The mark that says how many of a test's cases run by default."""
    return item.get_closest_marker("slow") or item.get_closest_marker("some")


def some_of_each(items: list[pytest.Item], *, one: bool = False) -> list[pytest.Item]:
    """Choose as many cases of each test function as its mark says, or one: always the same ones.

    They lie evenly among all of them, and meet the values of each parameter alike: no family,
    method or side is left out as long as there are as many cases.
    """
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = []
    for name, found in cases.items():
        mark = thins(found[0])
        wanted = 1 if one or mark is None else mark.kwargs.get("cases", 1)
        chosen += evenly(found, min(wanted, len(found)), crc32(name.encode()))
    return chosen


def evenly(items: list[pytest.Item], count: int, first: int) -> list[pytest.Item]:
    """So many of the cases of a test, from a place on that is not always the first."""
    values = [values_of(item) for item in items]
    met, left, chosen = Counter[object](), list(range(len(items))), []
    for number in range(count):
        even = first + number * len(items) // count

        def rank(place: int, even: int = even) -> tuple[int, int]:
            return sum(met[value] for value in values[place]), (place - even) % len(items)

        place = min(left, key=rank)
        left.remove(place)
        met.update(values[place])
        chosen.append(items[place])
    return chosen


def values_of(item: pytest.Item) -> list[tuple[str, object]]:
    """What tells a case from others of its test, by parameter."""
    case = getattr(item, "callspec", None)
    parameters = {} if case is None else case.params
    return [
        (name, value if isinstance(value, PLAIN) else id(value))
        for name, value in parameters.items()
    ]
