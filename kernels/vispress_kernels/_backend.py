"""Which implementation runs: one rule for every op."""

import os
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]


@cache
def has_triton() -> bool:
    """Whether Triton is installed (it is not imported to find out)."""
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's CPU interpreter was asked for, which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an op on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def resolve_backend(
    backend: Backend, *tensors: Tensor | None, has_backward: bool = True
) -> Literal["torch", "triton"]:
    """Choose the implementation that an op runs on these tensors.

    `"auto"` is Triton on CUDA tensors when it is installed, else the reference; also where a
    gradient is needed that the kernel does not give. fp64 always goes to the reference.

    Args:
        backend: What the caller asked for.
        *tensors: The op's tensors on one device; `None` entries are skipped.
        has_backward: Whether the op's kernel supports autograd.

    Raises:
        ValueError: `backend` is not a known name, or Triton was asked for tensors it cannot run on.
        ImportError: Triton was asked for and is not installed.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    on_cuda, doubles = True, False
    for tensor in tensors:  # a loop: every launch comes by here
        if tensor is not None:
            on_cuda = on_cuda and tensor.is_cuda
            doubles = doubles or tensor.dtype == torch.float64
    if backend == "torch" or doubles:
        return "torch"
    if backend == "auto" and not on_cuda:
        return "torch"
    given = [t for t in tensors if t is not None]
    without_gradient = has_backward or not needs_grad(*given)
    if backend == "auto":
        return "triton" if on_cuda and has_triton() and without_gradient else "torch"
    if not has_triton():
        raise ImportError("backend='triton' needs the package triton, which is not installed")
    if not on_cuda and not interpreting():
        devices = sorted({str(t.device) for t in given})
        raise ValueError(f"backend='triton' needs CUDA tensors, got {devices}")
    if not without_gradient:
        raise ValueError(
            "backend='triton' has no backward for this op: use backend='auto', detach the inputs, "
            "or call it under torch.no_grad()"
        )
    return "triton"
