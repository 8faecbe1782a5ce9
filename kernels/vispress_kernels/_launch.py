"""How kernels are launched: by rule from the shapes, on the device of the tensors.

Nothing here is autotuned: a choice that depended on timing would change the order of sums between
runs, and with it which of two nearly equal tokens is kept.
"""

from typing import Any

import torch
from torch import Tensor

from vispress_kernels._backend import interpreting

Rule = dict[str, int]
"""Block sizes, `num_warps` and `num_stages` of one launch."""


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, for `n >= 1`."""
    return 1 << (n - 1).bit_length()


def ceil_div(n: int, d: int) -> int:
    """`n / d`, rounded up."""
    return -(-n // d)


def dot_operand(x: Tensor) -> Tensor:
    """A tensor that `tl.dot` may read: itself, but for bf16 under the CPU interpreter.

    Triton's interpreter multiplies the bit patterns of bf16; in fp32 the products are the same as
    the device's.
    """
    return x.float() if x.dtype == torch.bfloat16 and interpreting() else x


def store_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a kernel writes computed values in: `dtype`, but for bf16 under the interpreter.

    Triton's interpreter cuts bits off where the device rounds to nearest; torch rounds instead.
    """
    return torch.float32 if dtype == torch.bfloat16 and interpreting() else dtype


def launch(kernel: Any, programs: int, *args: Any, on: Tensor, **options: Any) -> None:
    """Run `programs` programs of a Triton kernel on the device of `on`; none for 0.

    One grid axis carries everything, because the other two end at 65,535. Triton launches on the
    current device, which is not where the tensors are when a model is spread over several.
    """
    if not programs:
        return
    device = on.get_device()  # -1 for the CPU
    if device < 0 or device == torch.cuda.current_device():  # entering a device takes time
        kernel[(programs,)](*args, **options, enable_fp_fusion=True)
        return
    with torch.cuda.device(device):
        kernel[(programs,)](*args, **options, enable_fp_fusion=True)
