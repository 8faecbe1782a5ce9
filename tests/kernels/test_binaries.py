"""Prompts of any size share a few binaries: a user waits for few compiles, and early."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.test_compile import run_apart

PROBE = Path(__file__).with_name("binary_probe.py")
MOST = 14
"""Binaries of one kernel: blocks by rule (powers of two), numbers that are multiples of 16."""
ALL = 61
"""Of all kernels: 100 prompts asked for 107 while every count was specialised."""


@pytest.mark.full
def test_sizes_share_binaries():
    found = json.loads(run_apart(str(PROBE)))
    # all but max-min without its products, and DPP a step a launch, on more samples than cores
    assert len(found) == 20
    assert max(found.values()) <= MOST, found
    assert sum(found.values()) <= ALL, found
