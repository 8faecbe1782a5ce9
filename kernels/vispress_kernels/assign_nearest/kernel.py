"""`assign_nearest` in Triton: blocks of cosines are formed, reduced to their best, and forgotten.

Bound by the tensor cores. The targets are split over programs, one block each where the splits are
fewer than the tokens are wide, so that programs that run together share blocks of both sides in the
cache. The splits' bests are compared in order, so that ties still go to the lowest index.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispress_kernels._launch import Rule, ceil_div, dot_operand, launch, next_power_of_2
from vispress_kernels._tiles import in_groups, product_of_tiles
from vispress_kernels.assign_nearest.reference import EPS

WAVE = 120  # programs that fill a large GPU nearly once
COLUMNS = 4  # of D for each split, whose best and index then take less room than the tokens


@triton.jit(do_not_specialize=["N", "M"])
def inverse_norms_kernel(
    x_ptr,  # [B, N, D], any strides
    t_ptr,  # [B, M, D], any strides
    out_ptr,  # [B, N + M] fp32
    stride_xb,
    stride_xn,
    stride_xd,
    stride_tb,
    stride_tm,
    stride_td,
    N,
    M,
    D,
    EPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    # int64 before any multiply
    i_b = (pid // (N + M)).to(tl.int64)
    i_n = (pid % (N + M)).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    squares = tl.zeros((BLOCK_D,), tl.float32)
    if i_n < N:
        p_x = x_ptr + i_b * stride_xb + i_n * stride_xn + o_d * stride_xd
        step_x = (tl.zeros((), tl.int64) + BLOCK_D) * stride_xd
        for start in range(0, D, BLOCK_D):
            x = tl.load(p_x, mask=o_d < D - start, other=0.0).to(tl.float32)
            squares += x * x
            p_x += step_x
    else:
        p_t = t_ptr + i_b * stride_tb + (i_n - N) * stride_tm + o_d * stride_td
        step_t = (tl.zeros((), tl.int64) + BLOCK_D) * stride_td
        for start in range(0, D, BLOCK_D):
            t = tl.load(p_t, mask=o_d < D - start, other=0.0).to(tl.float32)
            squares += t * t
            p_t += step_t
    norm = tl.sqrt_rn(tl.sum(squares, axis=0))
    norm = tl.where(norm < EPS, EPS, norm)  # a NaN stays
    tl.store(out_ptr + i_b * (N + M) + i_n, tl.div_rn(1.0, norm))


@triton.jit(do_not_specialize=["N", "M", "splits", "tiles"])
def assign_nearest_kernel(
    x_ptr,  # [B, N, D], any strides
    t_ptr,  # [B, M, D], any strides
    inv_ptr,  # [B, N + M] fp32
    cosine_ptr,  # [B, N, S] fp32
    index_ptr,  # [B, N, S] int64, or int32 where S > 1
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
    EVEN: tl.constexpr,  # BLOCK_D divides D
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    i_n, i_s = in_groups(pid % (blocks_n * splits), blocks_n, splits, GROUP)
    # int64 before any multiply: B*N*D passes 2**31 for video
    i_n, i_s = i_n.to(tl.int64), i_s.to(tl.int64)
    i_b = (pid // (blocks_n * splits)).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    step_x = (tl.zeros((), tl.int64) + BLOCK_D) * stride_xd
    step_t = (tl.zeros((), tl.int64) + BLOCK_D) * stride_td
    inv_ptr += i_b * (N + M)
    x_inv = tl.load(inv_ptr + o_n, mask=m_n, other=0.0)
    # rows past the end read the last one and are not stored; targets past it are never the best
    row = x_ptr + i_b * stride_xb + tl.minimum(o_n, N - 1)[:, None] * stride_xn
    row += o_d[None, :] * stride_xd
    t_ptr += i_b * stride_tb
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    best_m = tl.zeros((BLOCK_N,), tl.int32)
    lane = tl.arange(0, BLOCK_M)
    for i in range(tiles):
        first = (i_s * tiles + i) * BLOCK_M
        o_m = tl.minimum(first + lane, M - 1)
        p_t = t_ptr + o_m[None, :] * stride_tm + o_d[:, None] * stride_td
        dot = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        dot = product_of_tiles(row, p_t, step_x, step_t, o_d, D, dot, EVEN, BLOCK_D)
        left = (M - first).to(tl.int32)
        # a NaN is never the best, so that no mask is needed for targets past the end
        t_inv = tl.load(inv_ptr + N + first + lane, mask=lane < left, other=float("nan"))
        cosine = dot * (x_inv[:, None] * t_inv[None, :])  # symmetric, as the pairs are
        usable = cosine == cosine
        if EXCLUDE_SELF:
            usable = usable & (lane[None, :] != (o_n - first).to(tl.int32)[:, None])
        cosine = tl.where(usable, cosine, float("-inf"))
        # the lowest index among equals, here and (by >) among blocks
        top = tl.max(cosine, axis=1)
        top_m = tl.min(tl.where(cosine == top[:, None], lane[None, :], BLOCK_M), axis=1)
        better = top > best
        best = tl.where(better, top, best)
        best_m = tl.where(better, first.to(tl.int32) + top_m, best_m)
    p_out = ((tl.zeros((), tl.int64) + N) * i_b + o_n) * splits + i_s
    tl.store(cosine_ptr + p_out, best, mask=m_n)
    tl.store(index_ptr + p_out, best_m.to(index_ptr.dtype.element_ty), mask=m_n)


@triton.jit(do_not_specialize=["R", "splits"])
def best_split_kernel(
    cosine_ptr,  # [R, S] fp32
    index_ptr,  # [R, S] int32
    out_cosine_ptr,  # [R] fp32
    out_index_ptr,  # [R] int64
    R,
    splits,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # int64 before any multiply
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_s = tl.arange(0, BLOCK_S)
    m_r = o_r < R
    mask = m_r[:, None] & (o_s < splits)[None, :]
    o_rs = o_r[:, None] * splits + o_s[None, :]
    cosine = tl.load(cosine_ptr + o_rs, mask=mask, other=float("-inf"))
    index = tl.load(index_ptr + o_rs, mask=mask, other=2147483647)
    top = tl.max(cosine, axis=1)
    # the lowest among equals; 0 where there is nothing to choose from, as every split says
    index = tl.min(tl.where(cosine == top[:, None], index, 2147483647), axis=1)
    tl.store(out_cosine_ptr + o_r, top, mask=m_r)
    tl.store(out_index_ptr + o_r, index.to(tl.int64), mask=m_r)


def launch_rule(rows: int, M: int, itemsize: int) -> Rule:
    """The largest blocks that give every multiprocessor one; stages fit 99 KiB of shared memory.

    Args:
        rows: B times N.
        M: Targets.
        itemsize: Bytes of an element.
    """
    if itemsize == 4:
        tile = {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3}
        return {"GROUP": 8, **tile}
    for n, m, d, warps, stages in (
        (128, 128, 64, 8, 3),
        (128, 64, 64, 4, 4),
        (64, 64, 128, 4, 3),
        (64, 32, 128, 4, 4),
    ):
        tile = {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_D": d, "num_warps": warps, "num_stages": stages}
        if ceil_div(rows, n) * ceil_div(M, m) >= WAVE:
            break
    return {"GROUP": 8, **tile}


def norm_rule(D: int) -> Rule:
    """A row a program."""
    return {"BLOCK_D": min(1024, max(64, next_power_of_2(D))), "num_warps": 4}


def split_rule(splits: int) -> Rule:
    """Some rows and all their splits a program."""
    width = next_power_of_2(splits)
    return {"BLOCK_R": max(1, 1024 // width), "BLOCK_S": width, "num_warps": 4}


def assign_nearest_triton(x: Tensor, targets: Tensor, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """Launch the kernels; arguments as in `assign_nearest_reference`."""
    B, N, D = x.shape
    M = targets.shape[1]
    rule = launch_rule(B * N, M, x.element_size())
    x, targets = dot_operand(x), dot_operand(targets)
    columns = ceil_div(M, rule["BLOCK_M"])
    tiles = ceil_div(columns, max(1, min(columns, D // COLUMNS)))
    splits = ceil_div(columns, tiles)
    sides = (*x.stride(), *targets.stride(), N, M, D)
    inverse = torch.empty(B, N + M, dtype=torch.float32, device=x.device)
    cosine = torch.empty(B, N, dtype=torch.float32, device=x.device)
    index = torch.empty(B, N, dtype=torch.int64, device=x.device)
    found: tuple[Tensor, ...] = cosine, index
    if splits > 1:
        shape, best = (B, N, splits), (torch.float32, torch.int32)
        found = tuple(torch.empty(shape, dtype=dtype, device=x.device) for dtype in best)
    norms = B * (N + M) if N else 0
    launch(inverse_norms_kernel, norms, x, targets, inverse, *sides, EPS=EPS, **norm_rule(D), on=x)
    launch(
        assign_nearest_kernel,
        B * ceil_div(N, rule["BLOCK_N"]) * splits,
        x,
        targets,
        inverse,
        *found,
        *sides,
        splits,
        tiles,
        EXCLUDE_SELF=exclude_self,
        EVEN=D % rule["BLOCK_D"] == 0,
        **rule,
        on=x,
    )
    if splits > 1:
        last = split_rule(splits)
        programs = ceil_div(B * N, last["BLOCK_R"])
        launch(best_split_kernel, programs, *found, cosine, index, B * N, splits, **last, on=x)
    return index, cosine
