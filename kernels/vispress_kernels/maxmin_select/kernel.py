"""`maxmin_select` in Triton: one launch a step, without a host sync or a distance matrix.

Bound by memory or cache: each step reads the tokens once, in their own dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispress_kernels._greedy import MAX_BESTS, dot_with_row, fold_best, read_best
from vispress_kernels._launch import Rule, ceil_div, launch
from vispress_kernels.assign_nearest.reference import inverse_norms
from vispress_kernels.maxmin_select.reference import zero_distance

ZERO = zero_distance(torch.float32)
LOWEST = torch.finfo(torch.float32).min


@triton.jit(do_not_specialize=["step"])
def maxmin_step_kernel(
    x_ptr,  # [B, N, D], any strides
    inv_ptr,  # [B, N] fp32: one over the norm
    weight_ptr,  # [B, N] fp32, or unused
    nearest_ptr,  # [B, N] fp32: distance to the closest chosen token, -inf where chosen
    value_ptr,  # [2, B, P] fp32
    index_ptr,  # [2, B, P] int32
    order_ptr,  # [B, K] int64
    stride_b,
    stride_n,
    stride_d,
    step,
    B,
    N,
    D,
    K,
    P,
    tiles,  # blocks of tokens a program has
    ZERO: tl.constexpr,
    LOWEST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    # int64 before any multiply: B*N*D passes 2**31 for video
    i_p = (pid % P).to(tl.int64)
    i_b = (pid // P).to(tl.int64)
    read = ((step % 2).to(tl.int64) * B + i_b) * P
    write = (((step + 1) % 2).to(tl.int64) * B + i_b) * P
    _, pick = read_best(value_ptr + read, index_ptr + read, P, BLOCK_P)
    tl.store(order_ptr + i_b * K + step, pick, mask=i_p == 0)
    if step + 1 < K:
        p_pick = x_ptr + i_b * stride_b + pick * stride_n
        inv_pick = tl.load(inv_ptr + i_b * N + pick)
        best = tl.full((), float("-inf"), tl.float32)
        best_n = tl.zeros((), tl.int32)
        for i in range(tiles):
            o_n = (i_p * tiles + i) * BLOCK_N + tl.arange(0, BLOCK_N)
            m_n = o_n < N
            p_x = x_ptr + i_b * stride_b + o_n * stride_n
            dot = dot_with_row(p_x, p_pick, stride_d, m_n, D, BLOCK_N, BLOCK_D)
            inv = tl.load(inv_ptr + i_b * N + o_n, mask=m_n, other=0.0)
            nearest = tl.load(nearest_ptr + i_b * N + o_n, mask=m_n, other=float("-inf"))
            taken = (nearest == float("-inf")) | (o_n == pick)
            # a NaN stays one: such tokens come after all others
            distance = 1.0 - dot * inv * inv_pick
            distance = tl.where(distance <= ZERO, 0.0, distance)
            known = (distance == distance) & (nearest == nearest)
            nearest = tl.where(known, tl.minimum(nearest, distance), float("nan"))
            nearest = tl.where(taken, float("-inf"), nearest)
            tl.store(nearest_ptr + i_b * N + o_n, nearest, mask=m_n)
            score = tl.where(taken, 0.0, nearest)
            if HAS_WEIGHT:
                score = score * tl.load(weight_ptr + i_b * N + o_n, mask=m_n, other=0.0)
            score = tl.where(score == score, score, LOWEST)
            score = tl.where(taken, float("-inf"), score)
            best, best_n = fold_best(score, o_n, best, best_n)
        tl.store(value_ptr + write + i_p, best)
        tl.store(index_ptr + write + i_p, best_n)


def launch_rule(N: int, D: int) -> Rule:
    """Tokens a block and elements at a time: many small programs, until there are 1024 of them."""
    block_n = 8 if N <= 8 * MAX_BESTS else 32
    return {"BLOCK_N": block_n, "BLOCK_D": 256 if D > 128 else 128, "num_warps": 4}


def maxmin_select_triton(x: Tensor, num_keep: int, first: Tensor, weight: Tensor | None) -> Tensor:
    """Launch the kernel once a step; arguments as in `maxmin_select_reference`."""
    B, N, D = x.shape
    order = torch.empty(B, num_keep, dtype=torch.int64, device=x.device)
    rule = launch_rule(N, D)
    tiles = ceil_div(ceil_div(N, rule["BLOCK_N"]), MAX_BESTS)
    P = ceil_div(N, tiles * rule["BLOCK_N"])
    # the first token is handed in as if a step before had found it
    value = torch.full((2, B, P), float("-inf"), dtype=torch.float32, device=x.device)
    index = torch.zeros(2, B, P, dtype=torch.int32, device=x.device)
    value[0, :, 0] = float("inf")
    index[0, :, 0] = first
    nearest = torch.full((B, N), float("inf"), dtype=torch.float32, device=x.device)
    inverse = inverse_norms(x)
    weight = None if weight is None else weight.float().contiguous()
    for step in range(num_keep):
        launch(
            maxmin_step_kernel,
            B * P,
            x,
            inverse,
            weight,
            nearest,
            value,
            index,
            order,
            *x.stride(),
            step,
            B,
            N,
            D,
            num_keep,
            P,
            tiles,
            ZERO=ZERO,
            LOWEST=LOWEST,
            HAS_WEIGHT=weight is not None,
            BLOCK_P=MAX_BESTS,
            **rule,
            on=x,
        )
    return order
