"""Vectors that the official implementations computed, by method and case.

`VISPRESS_PARITY_DIR` names another folder with the same keys and other cases, shapes and seeds, as
plain `.npz` files; hence tests learn cases and sizes from the files. `pack` makes those of `data`.
"""

import io
import lzma
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(os.environ.get("VISPRESS_PARITY_DIR", Path(__file__).parent / "data"))


READ = set()
"""`(method, case, key)` of every value that was looked at; see `test_every_vector_is_read`."""


class Case(dict):
    """Values of one case by key, which remembers those that are looked at."""

    def __init__(self, method, name):
        super().__init__()
        self.method, self.name = method, name

    def __getitem__(self, key):
        READ.add((self.method, self.name, key))
        return super().__getitem__(key)


@cache
def load(method):
    """`{case: {key: value}}`; scalars as Python numbers, arrays as tensors."""
    cases = {}
    with np.load(_file_of(method), allow_pickle=False) as file:
        for name in file.files:
            if name != "meta":
                case, key = name.split("/", 1)
                cases.setdefault(case, Case(method, case))[key] = _plain(file[name])
    return cases


def _file_of(method):
    """What numpy reads the vectors of a method from."""
    packed = FOLDER / f"{method}.npz.xz"
    if packed.exists():
        return io.BytesIO(lzma.decompress(packed.read_bytes()))
    return FOLDER / f"{method}.npz"


def _plain(value):
    if value.ndim == 0:
        return value.item()
    return value.tolist() if value.dtype.kind == "U" else torch.from_numpy(value)


def each_case(method, having=None):
    """Parametrise a test by the cases of a method (those that have the key `having`)."""
    found = [
        pytest.param(case, id=name)
        for name, case in load(method).items()
        if having is None or having in case
    ]
    assert found, f"no case of {method} has {having}"
    return pytest.mark.parametrize("case", found)


def close(ours, official, *, rtol=1e-4, atol=1e-5):
    """Compare floats with the tolerance of the vectors."""
    torch.testing.assert_close(ours, official.to(ours.dtype), rtol=rtol, atol=atol)


def same_kept(case, ours, official, score):
    """Equal indices; where the official ranking had ties, equal scores of what is kept."""
    if case["flag/ties"]:
        assert ours.shape == official.shape
        assert len(ours.unique()) == ours.numel()
        close(score[ours].sort().values, score[official].sort().values)
    else:
        assert ours.tolist() == official.tolist()
