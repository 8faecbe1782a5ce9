"""Greedy selection of tokens that cover all tokens, and that fit."""

import torch
from torch import Tensor

from vispress_kernels._backend import Backend, resolve_backend
from vispress_kernels._checks import check_count, check_device, check_floating, check_shape
from vispress_kernels.cover_select.reference import cover_select_reference
from vispress_kernels.products import fits

__all__ = ["cover_select", "cover_select_reference"]


def cover_select(
    x: Tensor, fit: Tensor, num_keep: int, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Maximise `sum_x max_y sim(x, y) + sum_y fit(y)` greedily, one token y a step.

    The similarity is `(cos + 1) / 2`. Of equal gains the earlier token is taken; one that equals a
    taken one covers nothing more. A NaN in a sample is in all its gains. A gain changes with every
    pick and for every token, so the cosines of a sample are held while it is worked on (N^2, all
    of which each step looks at): the kernel takes all steps in one launch whose programs meet
    between steps. Beyond 4,096 tokens (or as many as they are wide, for the reference) memory is
    O(N D): a gain never grows, so those of before are bounds, and only tokens that may still be the
    best are looked at again. That is plain torch, and waits for the device. Not differentiable.

    Args:
        x: Tokens `[B, N, D]`, fp16, bf16, fp32 or fp64, any strides; cosines are in fp32.
        fit: What a token brings beside its coverage `[B, N]`, floating, finite.
        num_keep: Tokens to choose (K), in `[0, N]`.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        Indices `[B, K]` int64, in the order chosen, and the gain of each `[B, K]`, in fp32 (fp64
        of fp64).

    Raises:
        ValueError: Shapes or devices disagree, or `num_keep` is out of range.
        TypeError: A tensor is not floating.
    """
    check_shape(x=(x, (None, None, None)))
    B, N, D = x.shape
    check_shape(fit=(fit, (B, N)))
    check_count("num_keep", num_keep, 0, N)
    check_floating(x=x, fit=fit)
    check_device(x=x, fit=fit)
    x, fit = x.detach(), fit.detach()
    chosen = resolve_backend(backend, x)
    if B == 0 or num_keep == 0:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        none = torch.empty(B, num_keep, dtype=wide, device=x.device)
        return none.long(), none
    if chosen == "triton":
        from vispress_kernels.cover_select.kernel import MOST, cover_select_triton

        if N <= MOST and fits(N, D):
            return cover_select_triton(x, fit, num_keep)
    return cover_select_reference(x, fit, num_keep)
