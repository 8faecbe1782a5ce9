"""Kernel tests: the same tests run interpreted on a CPU and compiled where there is a GPU."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from tests.kernels.interpreter import multiply_alike_everywhere, replace_once_a_launch

# read when a kernel is decorated, so before any kernel module is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="package", autouse=True)
def _interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("triton") and not torch.cuda.is_available():
            replace_once_a_launch(patch)
            multiply_alike_everywhere(patch)
        yield


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch):
    """Fill new tensors with NaN, or with nonsense integers, so that what is not written shows."""

    def poisoned(make):
        def filled(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else 77)

        return filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture
def randn(device):
    """Seeded normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    return make


@pytest.fixture
def assert_accurate():
    """The kernel may err twice as much as the reference of the same dtype does against fp64."""

    def check(kernel, reference, exact):
        assert kernel.shape == reference.shape
        assert kernel.dtype == reference.dtype
        if not exact.numel():
            return
        allowed = 2 * (reference.double() - exact).abs().max()
        # a few units of fp32: sums in another order
        allowed = allowed + 2**-21 * exact.abs().max()
        error = (kernel.double() - exact).abs().max()
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"

    return check
