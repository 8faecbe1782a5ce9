"""`assign_nearest` in Triton: blocks of cosines are formed, reduced to their best, and forgotten.

Bound by the tensor cores. Where rows are too few to fill the device the targets are split over
programs, whose bests are compared in order, so that ties still go to the lowest index.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispress_kernels._launch import Rule, ceil_div, dot_operand, launch
from vispress_kernels.assign_nearest.reference import inverse_norms

PROGRAMS = 264  # two for each multiprocessor of a large GPU


@triton.jit
def assign_nearest_kernel(
    x_ptr,  # [B, N, D], any strides
    t_ptr,  # [B, M, D], any strides
    x_inv_ptr,  # [B, N] fp32
    t_inv_ptr,  # [B, M] fp32
    cosine_ptr,  # [B, N, S] fp32
    index_ptr,  # [B, N, S] int64
    stride_xb,
    stride_xn,
    stride_xd,
    stride_tb,
    stride_tm,
    stride_td,
    N,
    M,
    D,
    splits,
    tiles,  # blocks of targets a split has
    EXCLUDE_SELF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    # int64 before any multiply: B*N*D passes 2**31 for video
    i_s = (pid % splits).to(tl.int64)
    i_n = ((pid // splits) % blocks_n).to(tl.int64)
    i_b = (pid // splits // blocks_n).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    x_inv = tl.load(x_inv_ptr + i_b * N + o_n, mask=m_n, other=0.0)
    p_x = x_ptr + i_b * stride_xb + o_n[:, None] * stride_xn
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    best_m = tl.zeros((BLOCK_N,), tl.int64)
    for i in range(tiles):
        o_m = (i_s * tiles + i) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        p_t = t_ptr + i_b * stride_tb + o_m[None, :] * stride_tm
        dot = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, D, BLOCK_D):
            o_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            m_d = o_d < D
            x = tl.load(p_x + o_d[None, :] * stride_xd, mask=m_n[:, None] & m_d[None, :], other=0.0)
            t = tl.load(p_t + o_d[:, None] * stride_td, mask=m_d[:, None] & m_m[None, :], other=0.0)
            dot = tl.dot(x, t, dot, input_precision="tf32x3")
        t_inv = tl.load(t_inv_ptr + i_b * M + o_m, mask=m_m, other=0.0)
        cosine = dot * (x_inv[:, None] * t_inv[None, :])  # symmetric, as the pairs are
        usable = m_m[None, :] & (cosine == cosine)
        if EXCLUDE_SELF:
            usable = usable & (o_m[None, :] != o_n[:, None])
        cosine = tl.where(usable, cosine, float("-inf"))
        top = tl.max(cosine, axis=1)
        # the lowest index among equals, here and (by >) among blocks
        top_m = tl.min(tl.where(cosine == top[:, None], o_m[None, :], M), axis=1)
        better = top > best
        best = tl.where(better, top, best)
        best_m = tl.where(better, top_m, best_m)
    p_out = (i_b * N + o_n) * splits + i_s
    tl.store(cosine_ptr + p_out, best, mask=m_n)
    tl.store(index_ptr + p_out, best_m, mask=m_n)


def launch_rule(itemsize: int) -> Rule:
    """Blocks by element size: 3 stages of both tiles stay within 99 KiB of shared memory."""
    block = 64 if itemsize == 2 else 32
    return {
        "BLOCK_N": 64,
        "BLOCK_M": 64,
        "BLOCK_D": block,
        "num_warps": 8,
        "num_stages": 3,
    }


def assign_nearest_triton(x: Tensor, targets: Tensor, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments as in `assign_nearest_reference`."""
    B, N, D = x.shape
    M = targets.shape[1]
    rule = launch_rule(x.element_size())
    x, targets = dot_operand(x), dot_operand(targets)
    rows, columns = ceil_div(N, rule["BLOCK_N"]), ceil_div(M, rule["BLOCK_M"])
    wanted = max(1, min(PROGRAMS // max(1, B * rows), columns, D))
    tiles = ceil_div(columns, wanted)
    splits = ceil_div(columns, tiles)
    cosine = torch.empty(B, N, splits, dtype=torch.float32, device=x.device)
    index = torch.empty(B, N, splits, dtype=torch.int64, device=x.device)
    launch(
        assign_nearest_kernel,
        B * rows * splits,
        x,
        targets,
        inverse_norms(x),
        inverse_norms(targets),
        cosine,
        index,
        *x.stride(),
        *targets.stride(),
        N,
        M,
        D,
        splits,
        tiles,
        EXCLUDE_SELF=exclude_self,
        **rule,
        on=x,
    )
    best = cosine.argmax(-1, keepdim=True)  # the first of equals: the lowest targets
    return index.gather(-1, best)[..., 0], cosine.gather(-1, best)[..., 0]
