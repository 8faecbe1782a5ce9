"""`dpp_select` in Triton: one launch, or one a step, without a host sync or an N x N kernel matrix.

Bound by memory or cache: step s reads the tokens and s columns of the factor once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispress_kernels._greedy import (
    MAX_BESTS,
    arrange,
    dot_with_row,
    fold_best,
    inverse_of_norms,
    meet,
    read_best,
)
from vispress_kernels._launch import launch, next_power_of_2
from vispress_kernels.assign_nearest.reference import EPS, inverse_norms
from vispress_kernels.dpp_select.reference import dpp_start
from vispress_kernels.maxmin_select.reference import first_of_best

BLOCK_S = 128  # columns of the factor read at a time
NOISE = 10 * torch.finfo(torch.float32).eps


@triton.jit
def _step(
    x_ptr,
    inv_ptr,
    relevance_ptr,
    gain_ptr,
    factor_ptr,
    value_ptr,
    index_ptr,
    order_ptr,
    floor,
    stride_n,
    stride_d,
    step,
    i_b,
    i_p,
    B,
    N,
    D,
    K,
    R,
    P,
    tiles,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Take the best of the step before; then a column of the factor for this program's tokens."""
    step = tl.zeros((), tl.int64) + step
    read, write = (step % 2 * 2 * B + i_b) * P, ((step + 1) % 2 * 2 * B + i_b) * P
    top, pick = read_best(value_ptr + read, index_ptr + read, P, BLOCK_P)
    read += B.to(tl.int64) * P
    _, relevant = read_best(value_ptr + read, index_ptr + read, P, BLOCK_P)
    # false once, false for good: no column is left out before one that is used
    found = (top > floor) & (step < R)
    pick = tl.where(found, pick, relevant)
    tl.store(order_ptr + i_b * K + step, pick, mask=i_p == 0)
    if step + 1 < K:
        p_pick = x_ptr + pick * stride_n
        scale = tl.load(inv_ptr + i_b * N + pick, cache_modifier=".cg")
        scale *= tl.load(relevance_ptr + i_b * N + pick, cache_modifier=".cg")
        root = tl.sqrt(tl.where(found, top, 1.0))
        best = tl.full((), float("-inf"), tl.float32)
        best_n = tl.zeros((), tl.int32)
        second = tl.full((), float("-inf"), tl.float32)
        second_n = tl.zeros((), tl.int32)
        for i in range(tiles):
            o_n = (i_p * tiles + i) * BLOCK_N + tl.arange(0, BLOCK_N)
            m_n = o_n < N
            relevance = tl.load(relevance_ptr + i_b * N + o_n, mask=m_n, other=0.0)
            gain = tl.load(gain_ptr + i_b * N + o_n, mask=m_n, other=float("-inf"))
            open_n = m_n & (o_n != pick) & (gain != float("-inf"))
            if found:
                p_x = x_ptr + o_n * stride_n
                dot = dot_with_row(p_x, p_pick, stride_d, m_n, D, BLOCK_N, BLOCK_D)
                inv = tl.load(inv_ptr + i_b * N + o_n, mask=m_n, other=0.0)
                row = dot * inv * relevance * scale
                p_factor = factor_ptr + (i_b * N + o_n) * R
                p_known = factor_ptr + (i_b * N + pick) * R
                row -= dot_with_row(p_factor, p_known, 1, m_n, step, BLOCK_N, BLOCK_S)
                column = row / root
                tl.store(p_factor + step, column, mask=m_n)
                gain = tl.maximum(gain - column * column, 0.0)
            gain = tl.where(open_n, gain, float("-inf"))
            tl.store(gain_ptr + i_b * N + o_n, gain, mask=m_n)
            best, best_n = fold_best(gain, o_n, best, best_n)
            relevance = tl.where(open_n, relevance, float("-inf"))
            second, second_n = fold_best(relevance, o_n, second, second_n)
        _leave(value_ptr, index_ptr, write + i_p, B, P, best, best_n, second, second_n)


@triton.jit
def _leave(value_ptr, index_ptr, at, B, P, best, best_n, second, second_n):
    """Leave a program's best by gain and its best by relevance for the next step."""
    behind = B.to(tl.int64) * P
    tl.store(value_ptr + at, best)
    tl.store(index_ptr + at, best_n)
    tl.store(value_ptr + at + behind, second)
    tl.store(index_ptr + at + behind, second_n)


@triton.jit(do_not_specialize=["step", "B", "N", "K", "R", "P", "tiles"])
def dpp_step_kernel(
    x_ptr,  # [B, N, D], any strides
    inv_ptr,  # [B, N] fp32: one over the norm
    relevance_ptr,  # [B, N] fp32
    gain_ptr,  # [B, N] fp32, -inf where chosen
    factor_ptr,  # [B, N, R] fp32
    value_ptr,  # [2, 2, B, P] fp32: buffer; gain or relevance
    index_ptr,  # [2, 2, B, P] int32
    order_ptr,  # [B, K] int64
    floor_ptr,  # [B] fp32
    stride_b,
    stride_n,
    stride_d,
    step,
    B,
    N,
    D,
    K,
    R,
    P,
    tiles,  # blocks of tokens a program has
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    pid = tl.program_id(0)
    # int64 before any multiply: B*N*D passes 2**31 for video
    i_p = (pid % P).to(tl.int64)
    i_b = (pid // P).to(tl.int64)
    _step(
        x_ptr + i_b * stride_b, inv_ptr, relevance_ptr, gain_ptr, factor_ptr, value_ptr, index_ptr,
        order_ptr, tl.load(floor_ptr + i_b), stride_n, stride_d, step, i_b, i_p,
        B, N, D, K, R, P, tiles, BLOCK_P, BLOCK_N, BLOCK_D, BLOCK_S,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["B", "N", "K", "R", "P", "tiles"],
    do_not_specialize_on_alignment=["relevance_ptr", "gain_ptr"],
)
def dpp_kernel(
    x_ptr,  # as above
    inv_ptr,
    relevance_ptr,  # what is written: NaN as 0
    gain_ptr,
    factor_ptr,
    value_ptr,
    index_ptr,
    order_ptr,
    given_ptr,  # [B, N] fp32: relevance as given
    count_ptr,  # [B] int32, zeros: how often programs of a sample met
    stride_b,
    stride_n,
    stride_d,
    B,
    N,
    D,
    K,
    R,
    P,
    tiles,
    EPS: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    pid = tl.program_id(0)
    i_p = (pid % P).to(tl.int64)
    i_b = (pid // P).to(tl.int64)
    x_ptr += i_b * stride_b
    best = tl.full((), float("-inf"), tl.float32)
    best_n = tl.zeros((), tl.int32)
    second = tl.full((), float("-inf"), tl.float32)
    second_n = tl.zeros((), tl.int32)
    for i in range(tiles):
        o_n = (i_p * tiles + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        inv = inverse_of_norms(x_ptr + o_n * stride_n, stride_d, m_n, D, EPS, BLOCK_N, BLOCK_D)
        tl.store(inv_ptr + i_b * N + o_n, inv, mask=m_n)
        relevance = tl.load(given_ptr + i_b * N + o_n, mask=m_n, other=0.0)
        relevance = tl.where(relevance == relevance, relevance, 0.0)
        tl.store(relevance_ptr + i_b * N + o_n, relevance, mask=m_n)
        gain = tl.where(m_n, relevance * relevance, float("-inf"))
        tl.store(gain_ptr + i_b * N + o_n, gain, mask=m_n)
        best, best_n = fold_best(gain, o_n, best, best_n)
        relevance = tl.where(m_n, relevance, float("-inf"))
        second, second_n = fold_best(relevance, o_n, second, second_n)
    _leave(value_ptr, index_ptr, i_b * P + i_p, B, P, best, best_n, second, second_n)
    meet(count_ptr + i_b, P)
    top, _ = read_best(value_ptr + i_b * P, index_ptr + i_b * P, P, BLOCK_P)
    for step in range(K):
        _step(
            x_ptr, inv_ptr, relevance_ptr, gain_ptr, factor_ptr, value_ptr, index_ptr, order_ptr,
            NOISE * top, stride_n, stride_d, step, i_b, i_p, B, N, D, K, R, P, tiles,
            BLOCK_P, BLOCK_N, BLOCK_D, BLOCK_S,
        )  # fmt: skip
        meet(count_ptr + i_b, (step + 2) * P)


def dpp_select_triton(x: Tensor, relevance: Tensor, num_keep: int) -> Tensor:
    """Launch a kernel; arguments as in `dpp_select_reference`."""
    B, N, D = x.shape
    order = torch.empty(B, num_keep, dtype=torch.int64, device=x.device)
    whole, rule, P, tiles = arrange(x)
    value = torch.empty(2, 2, B, P, dtype=torch.float32, device=x.device)
    index = torch.empty(2, 2, B, P, dtype=torch.int32, device=x.device)
    rank = min(num_keep, D)
    factor = torch.empty(B, N, rank, dtype=torch.float32, device=x.device)
    sizes = (B, N, D, num_keep, rank, P, tiles)
    if whole:
        given = relevance.float().contiguous()
        inverse, relevance, gain = torch.empty(3, B, N, dtype=torch.float32, device=x.device)
        count = torch.zeros(B, dtype=torch.int32, device=x.device)
        launch(
            dpp_kernel, B * P, x, inverse, relevance, gain, factor, value, index, order, given,
            count, *x.stride(), *sizes, EPS=EPS, NOISE=NOISE, BLOCK_P=next_power_of_2(P),
            BLOCK_S=BLOCK_S, **rule, launch_cooperative_grid=True, on=x,
        )  # fmt: skip
        return order
    relevance, gain, floor = dpp_start(x, relevance.contiguous())
    inverse, index[:], value[:] = inverse_norms(x), 0, float("-inf")
    # the first candidates are handed in as if a step before had found them
    value[0, 0, :, 0], index[0, 0, :, 0] = gain.amax(1), first_of_best(gain).int()
    value[0, 1, :, 0], index[0, 1, :, 0] = relevance.amax(1), first_of_best(relevance).int()
    for step in range(num_keep):
        launch(
            dpp_step_kernel, B * P, x, inverse, relevance, gain, factor, value, index, order, floor,
            *x.stride(), step, *sizes, BLOCK_P=MAX_BESTS, BLOCK_S=BLOCK_S, **rule, on=x,
        )  # fmt: skip
    return order
