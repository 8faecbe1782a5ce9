"""Argument checks shared by the public faces. Shapes and dtypes only: values would cost a sync."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(**tensors: Tensor | None) -> None:
    """Refuse tensors that are not fp16, bf16, fp32 or fp64.

    Raises:
        TypeError: Names the first such tensor and its dtype.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")


def check_dtype(dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """Refuse tensors of another dtype.

    Raises:
        TypeError: Names the first such tensor, its dtype and the one expected.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")


def check_shape(**tensors: tuple[Tensor | None, tuple[int | None, ...]]) -> None:
    """Refuse tensors whose shape is not the one expected; `None` in a shape fits any size.

    Raises:
        ValueError: Names the first such tensor, its shape and the one expected.
    """
    for name, (tensor, expected) in tensors.items():
        if tensor is None:
            continue
        fits = tensor.dim() == len(expected)
        if fits:  # a loop: every launch comes by here
            for got, want in zip(tensor.shape, expected, strict=True):
                fits = fits and (want is None or got == want)
        if not fits:
            wanted = tuple("*" if size is None else size for size in expected)
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")


def check_device(**tensors: Tensor | None) -> None:
    """Refuse tensors on different devices.

    Raises:
        ValueError: Lists every tensor's device.
    """
    devices = {name: str(t.device) for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"tensors must share one device, got {devices}")


def check_count(name: str, value: int, low: int, high: int) -> None:
    """Refuse a count that is not an integer or is outside `[low, high]`.

    Raises:
        TypeError: Names the value, which is not an integer.
        ValueError: Names the value and its range.
    """
    if not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


def check_heads(q: Tensor, k: Tensor) -> None:
    """Refuse queries `[B, H, ...]` and keys `[B, Hk, ...]` that make no attention.

    Raises:
        ValueError: The heads of k do not divide those of q, or heads have no width.
    """
    H, Hk = q.shape[1], k.shape[1]
    if Hk == 0 or H % Hk:
        raise ValueError(f"q has {H} heads, which the {Hk} heads of k do not divide")
    if q.shape[-1] == 0:
        raise ValueError(f"heads must have a width of at least 1, got q of shape {tuple(q.shape)}")
