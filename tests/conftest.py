"""Shared settings of all tests, and which of them run: default, `-m full`, `--quick`."""

import os
import re
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="one case of each test function, and no slow one"
    )
    parser.addoption(
        "--by-default", action="store_true", help="a node id asks for no case that is left out"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `full`, and most cases of slow tests, unless they are asked for.

    `-m full` asks for everything, a node id for its case.
    """
    if re.search(r"\bfull\b", config.option.markexpr):
        for item in items:  # everything, not only what is left out by default
            item.add_marker(pytest.mark.full)
        return
    named = {arg.rpartition("/")[2] for arg in config.args if "[" in arg}
    if config.option.by_default:
        named = set()
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


def thins(item: pytest.Item) -> pytest.Mark | None:
    """The mark that says how many of a test's cases run by default."""
    return item.get_closest_marker("slow") or item.get_closest_marker("some")


def some_of_each(items: list[pytest.Item], *, one: bool = False) -> list[pytest.Item]:
    """Choose as many cases of each test function as its mark says, or one: always the same ones.

    They lie evenly among all of them, so that no family or method is met alone.
    """
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = []
    for name, found in cases.items():
        mark = thins(found[0])
        wanted = 1 if one or mark is None else mark.kwargs.get("cases", 1)
        count = min(wanted, len(found))
        first = crc32(name.encode())  # not always the first ones
        chosen += [found[(first + i * len(found) // count) % len(found)] for i in range(count)]
    return chosen


GEMMA3 = ("test_law13_masks", "test_sliding_cache", "test_softmax_scores", "test_decoder_kinds")


@pytest.fixture(autouse=True)
def _gemma3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve Gemma 3 by an adapter of the tests, in the files that are about its masks alone."""
    if request.module.__name__.rsplit(".", 1)[-1] in GEMMA3:
        from tests.laws.windows import Gemma3TestAdapter
        from vispress.adapters import registry

        monkeypatch.setitem(registry._ADAPTERS, "Gemma3Model", Gemma3TestAdapter)
