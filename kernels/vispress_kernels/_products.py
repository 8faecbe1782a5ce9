"""Cosines of all tokens with each other, in Triton, for selections that read a row of them a step.

Imported by their kernels only: this imports triton. Bound by the tensor cores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispress_kernels._launch import Rule, ceil_div, dot_operand, launch
from vispress_kernels._tiles import in_groups, product_of_tiles
from vispress_kernels.assign_nearest.kernel import launch_rule
from vispress_kernels.assign_nearest.reference import inverse_norms


@triton.jit(do_not_specialize=["N"])
def products_kernel(
    x_ptr,  # [B, N, D], any strides
    inv_ptr,  # [B, N] fp32: one over the norm
    out_ptr,  # [B, N, N] fp32
    stride_b,
    stride_n,
    stride_d,
    N,
    D,
    EVEN: tl.constexpr,  # BLOCK_D divides D
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    pid = tl.program_id(0)
    rows, columns = tl.cdiv(N, BLOCK_N), tl.cdiv(N, BLOCK_M)
    i_n, i_m = in_groups(pid % (rows * columns), rows, columns, GROUP)
    # int64 before any multiply
    i_b = (pid // (rows * columns)).to(tl.int64)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    step = (tl.zeros((), tl.int64) + BLOCK_D) * stride_d
    x_ptr += i_b * stride_b
    inv_ptr += i_b * N
    # rows and columns past the end read the last one and are not stored
    p_rows = x_ptr + tl.minimum(o_n, N - 1)[:, None] * stride_n + o_d[None, :] * stride_d
    p_columns = x_ptr + tl.minimum(o_m, N - 1)[None, :] * stride_n + o_d[:, None] * stride_d
    dot = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    dot = product_of_tiles(p_rows, p_columns, step, step, o_d, D, dot, EVEN, BLOCK_D)
    inv_n = tl.load(inv_ptr + o_n, mask=o_n < N, other=0.0)
    inv_m = tl.load(inv_ptr + o_m, mask=o_m < N, other=0.0)
    cosine = dot * (inv_n[:, None] * inv_m[None, :])  # symmetric, as the pairs are
    p_out = out_ptr + (i_b * N + o_n)[:, None] * N + o_m[None, :]
    tl.store(p_out, cosine, mask=(o_n < N)[:, None] & (o_m < N)[None, :])


def products_rule(rows: int, N: int, itemsize: int) -> Rule:
    """Blocks as for nearest targets, or smaller ones: all of a block is stored, with its addresses.

    Args:
        rows: B times N.
        N: Tokens.
        itemsize: Bytes of an element.
    """
    rule = launch_rule(rows, N, itemsize)
    if rule["BLOCK_N"] == 128:
        rule |= {"BLOCK_M": 64, "num_warps": 8, "num_stages": 3}
    return rule


def products_triton(x: Tensor) -> Tensor:
    """Cosines `[B, N, N]` in fp32 of tokens `[B, N, D]`; norms below 1e-8 count as 1e-8."""
    B, N, D = x.shape
    out = torch.empty(B, N, N, dtype=torch.float32, device=x.device)
    rule, inverse, x = products_rule(B * N, N, x.element_size()), inverse_norms(x), dot_operand(x)
    programs = B * ceil_div(N, rule["BLOCK_N"]) * ceil_div(N, rule["BLOCK_M"])
    even = D % rule["BLOCK_D"] == 0
    launch(products_kernel, programs, x, inverse, out, *x.stride(), N, D, EVEN=even, **rule, on=x)
    return out
