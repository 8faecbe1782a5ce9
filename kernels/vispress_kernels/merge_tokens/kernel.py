"""`merge_tokens` in Triton: tokens are ordered by group, then a program sums one group's columns.

Memory-bound: reads every assigned token once and writes every group once. No atomics: a column's
sum adds the tokens one by one in their order, so runs agree bit for bit, whatever the strides.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vispress_kernels._backend import needs_grad
from vispress_kernels._launch import Rule, ceil_div, launch, next_power_of_2, store_dtype
from vispress_kernels.merge_tokens.reference import group_weights

MOST_COMPARED = 2**28
"""Pairs of tokens in a batch row up to which comparing them all beats torch's sort."""


@triton.jit(do_not_specialize=["K"])
def order_tokens_kernel(
    assign_ptr,  # [B, N] int64, any strides
    order_ptr,  # [B, N] int32: tokens by group, those of none behind; of equals the earlier first
    start_ptr,  # [B, K + 1] int32: where each group starts in `order`
    stride_b,
    stride_n,
    N,
    K,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Places by counting: a token's is the number of tokens before it, a group's start likewise."""
    pid = tl.program_id(0)
    places = N + K + 1
    blocks = tl.cdiv(places, BLOCK_I)
    i_b = (pid // blocks).to(tl.int64)
    o_i = (pid % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    is_token = o_i < N
    p_assign = assign_ptr + i_b * stride_b
    group = tl.load(p_assign + o_i.to(tl.int64) * stride_n, mask=is_token, other=0)
    group = tl.where((group < 0) | (group >= K), K, group).to(tl.int32)
    group = tl.where(is_token, group, o_i - N)
    # a token is behind earlier ones of its group, a start before all of them
    turn = tl.where(is_token, o_i, 0)
    before = tl.zeros((BLOCK_I, BLOCK_J), tl.int32)
    for start in range(0, N, BLOCK_J):
        o_j = start + tl.arange(0, BLOCK_J)
        other = tl.load(p_assign + o_j.to(tl.int64) * stride_n, mask=o_j < N, other=0)
        other = tl.where((other < 0) | (other >= K), K, other).to(tl.int32)
        other = tl.where(o_j < N, other, K + 1)
        tie = (o_j[None, :] < turn[:, None]).to(tl.int32)
        before += (other[None, :] < group[:, None] + tie).to(tl.int32)
    place = tl.sum(before, axis=1)
    tl.store(order_ptr + i_b * N + place, o_i, mask=is_token)
    p_start = start_ptr + i_b * (K + 1) + (o_i - N)
    tl.store(p_start, place, mask=(o_i >= N) & (o_i < places))


@triton.jit(do_not_specialize=["N", "K"])
def merge_tokens_kernel(
    x_ptr,  # [B, N, D], any strides
    order_ptr,  # [B, N] integers: tokens by group
    weight_ptr,  # [B, N] floats in token order, or unused
    start_ptr,  # [B, K + 1] int32: where each group starts in `order`
    out_ptr,  # [B, K, D]
    stride_b,
    stride_n,
    stride_d,
    N,
    K,
    D,
    HAS_WEIGHT: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks_d = tl.cdiv(D, BLOCK_D)
    # int64 before any multiply: B*N*D passes 2**31 for video
    i_d = (pid % blocks_d).to(tl.int64)
    i_k = ((pid // blocks_d) % K).to(tl.int64)
    i_b = (pid // blocks_d // K).to(tl.int64)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    begin = tl.load(start_ptr + i_b * (K + 1) + i_k)
    end = tl.load(start_ptr + i_b * (K + 1) + i_k + 1)
    p_order = order_ptr + i_b * N
    p_x = x_ptr + i_b * stride_b + o_d * stride_d
    mass = (end - begin).to(tl.float32)
    share = 1.0 / tl.maximum(mass, 1.0)  # of each token, without weights
    if HAS_WEIGHT and MEAN:
        mass = 0.0
        for j in range(begin, end):
            o_n = tl.load(p_order + j).to(tl.int64)
            mass += tl.load(weight_ptr + i_b * N + o_n).to(tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        for i in tl.static_range(BLOCK_N):  # loads in flight together; sums one after the other
            here = end > start + i
            o_n = tl.load(p_order + start + i, mask=here, other=0).to(tl.int64)
            # a block's comparison: the interpreter cannot spread a scalar one
            mask = m_d & (tl.zeros_like(o_d) + end > start + i)
            row = tl.load(p_x + o_n * stride_n, mask=mask, other=0.0).to(tl.float32)
            # explicit fma: whether the compiler fuses would depend on the strides
            if HAS_WEIGHT:
                weight = tl.load(weight_ptr + i_b * N + o_n, mask=here, other=0.0).to(tl.float32)
                if MEAN:
                    weight = tl.where(mass == 0.0, 0.0, weight / tl.where(mass == 0.0, 1.0, mass))
                total = tl.fma(row, tl.zeros_like(row) + weight, total)
            elif MEAN:
                total = tl.fma(row, tl.zeros_like(row) + share, total)
            else:
                total += row
    tl.store(out_ptr + (i_b * K + i_k) * D + o_d, total.to(out_ptr.dtype.element_ty), mask=m_d)


def launch_rule(N: int, K: int, D: int, element_size: int) -> Rule:
    """Four rows in flight where groups have several; blocks that leave no lanes idle."""
    block_d = 1024 if D % 1024 == 0 else min(512, max(128, next_power_of_2(D)))
    return {
        "BLOCK_N": 1 if N <= K else 4,
        "BLOCK_D": block_d,
        "num_warps": max(1, block_d * element_size // 1024),
    }


def order_rule(B: int, places: int) -> Rule:
    """Enough programs to fill a device, each with 8 to 32 places."""
    block_i = 8 if B * places <= 8192 else 32
    return {"BLOCK_I": block_i, "BLOCK_J": 2048 // block_i, "num_warps": 4}


def _order_by_counting(assign: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    B, N = assign.shape
    order = torch.empty(B, N, dtype=torch.int32, device=assign.device)
    start = torch.empty(B, num_keep + 1, dtype=torch.int32, device=assign.device)
    places = N + num_keep + 1
    rule = order_rule(B, places)
    launch(
        order_tokens_kernel,
        B * ceil_div(places, rule["BLOCK_I"]),
        assign,
        order,
        start,
        *assign.stride(),
        N,
        num_keep,
        **rule,
        on=assign,
    )
    return order, start


def _order_by_sort(assign: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    # half the bits of int64, half the passes; sorting keeps the strides of `assign`
    group = assign.clamp(-1, num_keep).to(torch.int32)
    group, order = (t.contiguous() for t in group.sort(dim=1, stable=True))
    bounds = torch.arange(num_keep + 1, dtype=torch.int32, device=assign.device)
    bounds = bounds.expand(len(assign), -1).contiguous()
    return order, torch.searchsorted(group, bounds, out_int32=True)


def order_tokens(assign: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    """Tokens `[B, N]` by group, of equals the earlier first, and where groups start `[B, K + 1]`.

    Entries of `order` outside the groups' ranges are tokens of no group.
    """
    N = assign.shape[1]
    if N * (N + num_keep + 1) <= MOST_COMPARED:
        return _order_by_counting(assign, num_keep)
    return _order_by_sort(assign, num_keep)


def _launch_merge(
    x: Tensor, assign: Tensor, weight: Tensor | None, num_keep: int, mean: bool = False
) -> Tensor:
    B, N, D = x.shape
    out = torch.empty(B, num_keep, D, dtype=store_dtype(x.dtype), device=x.device)
    if out.numel():
        order, start = order_tokens(assign, num_keep)
        rule = launch_rule(N, num_keep, D, x.element_size())
        launch(
            merge_tokens_kernel,
            B * num_keep * ceil_div(D, rule["BLOCK_D"]),
            x,
            order,
            None if weight is None else weight.contiguous(),
            start,
            out,
            *x.stride(),
            N,
            num_keep,
            D,
            HAS_WEIGHT=weight is not None,
            MEAN=mean,
            **rule,
            on=x,
        )
    return out.to(x.dtype)


class _MergeTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, assign: Tensor, weight: Tensor | None, num_keep: int
    ) -> Tensor:
        ctx.save_for_backward(x, assign, weight)
        ctx.num_keep = num_keep
        return _launch_merge(x, assign, weight, num_keep)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, assign, weight = ctx.saved_tensors
        inside = (assign >= 0) & (assign < ctx.num_keep)
        batch = torch.arange(x.shape[0], device=x.device)[:, None]
        # [B, N, D]: what each token's group received; tokens of none, a row of zeros behind them
        padded = torch.nn.functional.pad(grad, (0, 0, 0, 1))
        rows = padded[batch, torch.where(inside, assign, ctx.num_keep)].float()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows if weight is None else rows * weight.float()[..., None]).to(x.dtype)
        if ctx.needs_input_grad[2]:
            grad_weight = (rows * x.float()).sum(-1).to(weight.dtype)
        return grad_x, None, grad_weight, None


def merge_tokens_triton(
    x: Tensor, assign: Tensor, weight: Tensor | None, num_keep: int, reduce: str
) -> Tensor:
    """Launch the kernel, with autograd; arguments as in `merge_tokens`, already checked there."""
    mean = reduce == "mean"
    if not needs_grad(x, weight):
        return _launch_merge(x, assign, weight, num_keep, mean)
    if mean:  # the gradient of the weights goes through the groups' totals
        weight = group_weights(assign, weight, num_keep)
    out: Tensor = _MergeTokens.apply(x, assign, weight, num_keep)
    return out
