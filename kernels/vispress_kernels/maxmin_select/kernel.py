"""`maxmin_select` in Triton, without a host sync.

Up to 4,096 tokens: one product of all tokens, and a program a sample that reads a row of it a step.
Beyond, or where few are chosen: one launch, or one a step, without a distance matrix; bound by
memory or cache, as each step reads the tokens once, in their own dtype.
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
from vispress_kernels._launch import Rule, launch, next_power_of_2
from vispress_kernels._products import products_triton
from vispress_kernels.assign_nearest.reference import EPS, inverse_norms
from vispress_kernels.maxmin_select.reference import zero_distance
from vispress_kernels.products import holds

ZERO = zero_distance(torch.float32)
LOWEST = torch.finfo(torch.float32).min
MOST = 4096
"""Tokens whose state one program keeps in its registers."""


@triton.jit
def _step(
    x_ptr,
    inv_ptr,
    weight_ptr,
    nearest_ptr,
    value_ptr,
    index_ptr,
    order_ptr,
    stride_n,
    stride_d,
    step,
    i_b,
    i_p,
    B,
    N,
    D,
    K,
    P,
    tiles,
    ZERO: tl.constexpr,
    LOWEST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Take the best of the step before; then distances, and the best of this program's tokens."""
    step = tl.zeros((), tl.int64) + step
    read, write = (step % 2 * B + i_b) * P, ((step + 1) % 2 * B + i_b) * P
    _, pick = read_best(value_ptr + read, index_ptr + read, P, BLOCK_P)
    tl.store(order_ptr + i_b * K + step, pick, mask=i_p == 0)
    if step + 1 < K:
        p_pick = x_ptr + pick * stride_n
        inv_pick = tl.load(inv_ptr + i_b * N + pick, cache_modifier=".cg")
        best = tl.full((), float("-inf"), tl.float32)
        best_n = tl.zeros((), tl.int32)
        for i in range(tiles):
            o_n = (i_p * tiles + i) * BLOCK_N + tl.arange(0, BLOCK_N)
            m_n = o_n < N
            p_x = x_ptr + o_n * stride_n
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


@triton.jit(do_not_specialize=["step", "B", "N", "K", "P", "tiles"])
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
    _step(
        x_ptr + i_b * stride_b, inv_ptr, weight_ptr, nearest_ptr, value_ptr, index_ptr, order_ptr,
        stride_n, stride_d, step, i_b, i_p, B, N, D, K, P, tiles,
        ZERO, LOWEST, HAS_WEIGHT, BLOCK_P, BLOCK_N, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["B", "N", "K", "P", "tiles"])
def maxmin_kernel(
    x_ptr,  # as above
    inv_ptr,
    weight_ptr,
    nearest_ptr,
    value_ptr,
    index_ptr,
    order_ptr,
    first_ptr,  # [B] int64
    count_ptr,  # [B] int32, zeros: how often programs of a sample met
    stride_b,
    stride_n,
    stride_d,
    B,
    N,
    D,
    K,
    P,
    tiles,
    EPS: tl.constexpr,
    ZERO: tl.constexpr,
    LOWEST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    i_p = (pid % P).to(tl.int64)
    i_b = (pid // P).to(tl.int64)
    x_ptr += i_b * stride_b
    for i in range(tiles):
        o_n = (i_p * tiles + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        inv = inverse_of_norms(x_ptr + o_n * stride_n, stride_d, m_n, D, EPS, BLOCK_N, BLOCK_D)
        tl.store(inv_ptr + i_b * N + o_n, inv, mask=m_n)
        tl.store(nearest_ptr + i_b * N + o_n, float("inf"), mask=m_n)
    # the first token is handed in as if a step before had found it
    tl.store(value_ptr + i_b * P + i_p, tl.where(i_p == 0, float("inf"), float("-inf")))
    tl.store(index_ptr + i_b * P + i_p, tl.load(first_ptr + i_b).to(tl.int32))
    meet(count_ptr + i_b, P)
    for step in range(K):
        _step(
            x_ptr, inv_ptr, weight_ptr, nearest_ptr, value_ptr, index_ptr, order_ptr,
            stride_n, stride_d, step, i_b, i_p, B, N, D, K, P, tiles,
            ZERO, LOWEST, HAS_WEIGHT, BLOCK_P, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        meet(count_ptr + i_b, (step + 2) * P)


@triton.jit(do_not_specialize=["N", "K"])
def maxmin_held_kernel(
    cosine_ptr,  # [B, N, N] fp32
    weight_ptr,  # [B, N] fp32, or unused
    first_ptr,  # [B] int64
    order_ptr,  # [B, K] int64
    N,
    K,
    ZERO: tl.constexpr,
    LOWEST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least N
):
    # one program takes all steps of a sample; a step reads one row, which is in the cache
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < N
    cosine_ptr += i_b * N * N
    # distance to the closest chosen token, -inf where chosen
    nearest = tl.where(m_n, float("inf"), float("-inf"))
    weight = tl.full((BLOCK_N,), 1.0, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + i_b * N + o_n, mask=m_n, other=0.0)
    pick = tl.load(first_ptr + i_b)
    for step in range(K):
        tl.store(order_ptr + i_b * K + step, pick)
        distance = 1.0 - tl.load(cosine_ptr + pick * N + o_n, mask=m_n, other=0.0)
        distance = tl.where(distance <= ZERO, 0.0, distance)
        taken = (nearest == float("-inf")) | (o_n == pick)
        # a NaN stays one: such tokens come after all others
        known = (distance == distance) & (nearest == nearest)
        nearest = tl.where(known, tl.minimum(nearest, distance), float("nan"))
        nearest = tl.where(taken, float("-inf"), nearest)
        score = tl.where(taken, 0.0, nearest) * weight
        score = tl.where(score == score, score, LOWEST)
        score = tl.where(taken, float("-inf"), score)
        _, best = fold_best(score, o_n, float("-inf"), 0)
        pick = best.to(tl.int64)


def held_rule(N: int) -> Rule:
    """All tokens in one block, at most eight a thread."""
    block = max(512, next_power_of_2(N))
    return {"BLOCK_N": block, "num_warps": max(4, min(16, block // 256))}


def maxmin_select_triton(x: Tensor, num_keep: int, first: Tensor, weight: Tensor | None) -> Tensor:
    """Launch a kernel; arguments as in `maxmin_select_reference`."""
    B, N, D = x.shape
    order = torch.empty(B, num_keep, dtype=torch.int64, device=x.device)
    weight = None if weight is None else weight.float().contiguous()
    if N <= MOST and holds(N, D, num_keep):
        cosines, first = products_triton(x), first.contiguous()
        launch(
            maxmin_held_kernel, B, cosines, weight, first, order, N, num_keep,
            ZERO=ZERO, LOWEST=LOWEST, HAS_WEIGHT=weight is not None, **held_rule(N), on=x,
        )  # fmt: skip
        return order
    whole, rule, P, tiles = arrange(x)
    value = torch.empty(2, B, P, dtype=torch.float32, device=x.device)
    index = torch.empty(2, B, P, dtype=torch.int32, device=x.device)
    nearest = torch.empty(B, N, dtype=torch.float32, device=x.device)
    inverse = torch.empty_like(nearest) if whole else inverse_norms(x)
    tensors = (x, inverse, weight, nearest, value, index, order)
    sizes = (B, N, D, num_keep, P, tiles)
    constants = {"ZERO": ZERO, "LOWEST": LOWEST, "HAS_WEIGHT": weight is not None, **rule}
    if whole:
        count = torch.zeros(B, dtype=torch.int32, device=x.device)
        launch(
            maxmin_kernel, B * P, *tensors, first.contiguous(), count, *x.stride(), *sizes,
            EPS=EPS, BLOCK_P=next_power_of_2(P), **constants, launch_cooperative_grid=True, on=x,
        )  # fmt: skip
        return order
    # the first token is handed in as if a step before had found it
    value[0], nearest[:] = float("-inf"), float("inf")
    value[0, :, 0], index[0] = float("inf"), first[:, None].int()
    for step in range(num_keep):
        launch(
            maxmin_step_kernel, B * P, *tensors, *x.stride(), step, *sizes,
            BLOCK_P=MAX_BESTS, **constants, on=x,
        )  # fmt: skip
    return order
