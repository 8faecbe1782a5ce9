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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `full`, unless it is asked for by `-m full` or by its node id."""
    if re.search(r"\bfull\b", config.option.markexpr):
        for item in items:  # everything, not only what is left out by default
            item.add_marker(pytest.mark.full)
        return
    named = {arg.rpartition("/")[2] for arg in config.args if "[" in arg}
    stay = [
        item
        for item in items
        if not item.get_closest_marker("full") or item.nodeid.rpartition("/")[2] in named
    ]
    if config.option.quick:
        stay = one_of_each([item for item in stay if not item.get_closest_marker("slow")])
    kept = set(stay)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = stay


def one_of_each(items: list[pytest.Item]) -> list[pytest.Item]:
    """One case of each test function: always the same one, and not always the first."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return [found[crc32(name.encode()) % len(found)] for name, found in cases.items()]
