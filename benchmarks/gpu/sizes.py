"""Sizes of models that part `bandwidth` measures ops at, and what a case of it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]


@dataclass(frozen=True)
class Size:
    """Visual tokens of one model: N tokens of width D, and the shapes around them."""

    name: str
    N: int
    D: int
    grid: tuple[int, int]
    images: int = 1
    heads: int = 32
    kv_heads: int = 32
    head: int = 128


SIZES = {
    "llava15": Size("llava15", 576, 4096, (24, 24)),
    "llava_next": Size("llava_next", 2880, 4096, (24, 24), images=5),
    "qwen_1296": Size("qwen_1296", 1296, 3584, (36, 36), heads=28, kv_heads=4),
    "qwen_16384": Size("qwen_16384", 16384, 3584, (128, 128), heads=28, kv_heads=4),
    "video": Size("video", 131072, 3584, (64, 64), images=32, heads=28, kv_heads=4),
}
TINY = {"tiny": Size("tiny", 24, 32, (3, 4), images=2, heads=2, kv_heads=1, head=16)}


@dataclass(frozen=True)
class Case:
    """One op on one set of inputs.

    Args:
        op: Its name.
        kernel: The Triton launch, by its public face.
        reference: The plain torch meaning.
        bound: `"bytes"` or `"flops"`, which floor counts.
        bytes: Least bytes through memory.
        flops: Least FLOPs on the matrix units.
        compiled: Gives `torch.compile` of the reference (of its step, where it is a loop).
    """

    op: str
    kernel: Call
    reference: Call
    bound: str
    bytes: int
    flops: int = 0
    compiled: Callable[[str], Call] | None = None


def whole(call: Callable[..., Any], *args: Any) -> Callable[[str], Call]:
    """`torch.compile` of a reference without loops."""

    def build(backend: str) -> Call:
        fast = torch.compile(call, dynamic=False, backend=backend)
        return lambda: fast(*args)

    return build


def tokens(size: Size, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, size.N, size.D, device=device, dtype=dtype)
