"""`dpp_select` in Triton: one launch a step, without a host sync or an N x N kernel matrix.

Bound by memory or cache: step s reads the tokens and s columns of the factor once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispress_kernels._greedy import MAX_BESTS, dot_with_row, fold_best, read_best
from vispress_kernels._launch import ceil_div, launch
from vispress_kernels.assign_nearest.reference import inverse_norms
from vispress_kernels.dpp_select.reference import dpp_start
from vispress_kernels.maxmin_select.kernel import launch_rule
from vispress_kernels.maxmin_select.reference import first_of_best


@triton.jit(do_not_specialize=["step"])
def dpp_step_kernel(
    x_ptr,  # [B, N, D], any strides
    inv_ptr,  # [B, N] fp32: one over the norm
    relevance_ptr,  # [B, N] fp32
    gain_ptr,  # [B, N] fp32, -inf where chosen
    floor_ptr,  # [B] fp32
    factor_ptr,  # [B, R, N] fp32
    value_ptr,  # [2, 2, B, P] fp32: buffer; gain or relevance
    index_ptr,  # [2, 2, B, P] int32
    order_ptr,  # [B, K] int64
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
):
    pid = tl.program_id(0)
    # int64 before any multiply: B*N*D passes 2**31 for video
    i_p = (pid % P).to(tl.int64)
    i_b = (pid // P).to(tl.int64)
    read = ((step % 2).to(tl.int64) * 2 * B + i_b) * P
    write = (((step + 1) % 2).to(tl.int64) * 2 * B + i_b) * P
    second_read = ((step % 2).to(tl.int64) * 2 * B + B + i_b) * P
    second_write = (((step + 1) % 2).to(tl.int64) * 2 * B + B + i_b) * P
    top, pick = read_best(value_ptr + read, index_ptr + read, P, BLOCK_P)
    _, relevant = read_best(value_ptr + second_read, index_ptr + second_read, P, BLOCK_P)
    floor = tl.load(floor_ptr + i_b)
    found = (top > floor) & (step < R)
    pick = tl.where(found, pick, relevant)
    tl.store(order_ptr + i_b * K + step, pick, mask=i_p == 0)
    if step + 1 < K:
        p_pick = x_ptr + i_b * stride_b + pick * stride_n
        scale = tl.load(inv_ptr + i_b * N + pick) * tl.load(relevance_ptr + i_b * N + pick)
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
                p_x = x_ptr + i_b * stride_b + o_n * stride_n
                dot = dot_with_row(p_x, p_pick, stride_d, m_n, D, BLOCK_N, BLOCK_D)
                inv = tl.load(inv_ptr + i_b * N + o_n, mask=m_n, other=0.0)
                row = dot * inv * relevance * scale
                p_factor = factor_ptr + i_b * R * N
                p_known = p_factor
                for _s in range(step):
                    column = tl.load(p_known + o_n, mask=m_n, other=0.0)
                    row -= column * tl.load(p_known + pick)
                    p_known += N
                column = row / root
                tl.store(p_factor + step.to(tl.int64) * N + o_n, column, mask=m_n)
                gain = tl.maximum(gain - column * column, 0.0)
            gain = tl.where(open_n, gain, float("-inf"))
            tl.store(gain_ptr + i_b * N + o_n, gain, mask=m_n)
            best, best_n = fold_best(gain, o_n, best, best_n)
            relevance = tl.where(open_n, relevance, float("-inf"))
            second, second_n = fold_best(relevance, o_n, second, second_n)
        tl.store(value_ptr + write + i_p, best)
        tl.store(index_ptr + write + i_p, best_n)
        tl.store(value_ptr + second_write + i_p, second)
        tl.store(index_ptr + second_write + i_p, second_n)


def dpp_select_triton(x: Tensor, relevance: Tensor, num_keep: int) -> Tensor:
    """Launch the kernel once a step; arguments as in `dpp_select_reference`."""
    B, N, D = x.shape
    relevance = relevance.contiguous()
    order = torch.empty(B, num_keep, dtype=torch.int64, device=x.device)
    rule = launch_rule(N, D)
    tiles = ceil_div(ceil_div(N, rule["BLOCK_N"]), MAX_BESTS)
    P = ceil_div(N, tiles * rule["BLOCK_N"])
    relevance, gain, floor = dpp_start(x, relevance)
    # the first candidates are handed in as if a step before had found them
    value = torch.full((2, 2, B, P), float("-inf"), dtype=torch.float32, device=x.device)
    index = torch.zeros(2, 2, B, P, dtype=torch.int32, device=x.device)
    value[0, 0, :, 0] = gain.amax(1)
    index[0, 0, :, 0] = first_of_best(gain)
    value[0, 1, :, 0] = relevance.amax(1)
    index[0, 1, :, 0] = first_of_best(relevance)
    rank = min(num_keep, D)
    factor = torch.zeros(B, rank, N, dtype=torch.float32, device=x.device)
    inverse = inverse_norms(x)
    for step in range(num_keep):
        launch(
            dpp_step_kernel,
            B * P,
            x,
            inverse,
            relevance,
            gain,
            floor,
            factor,
            value,
            index,
            order,
            *x.stride(),
            step,
            B,
            N,
            D,
            num_keep,
            rank,
            P,
            tiles,
            BLOCK_P=MAX_BESTS,
            **rule,
            on=x,
        )
    return order
