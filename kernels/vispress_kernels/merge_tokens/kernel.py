"""`merge_tokens` in Triton: tokens are sorted by group, then a program sums one group's columns.

Memory-bound: reads every assigned token once and writes every group once. No atomics: the order of
the sum is the order of the tokens, so runs agree bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vispress_kernels._launch import Rule, ceil_div, launch, store_dtype


@triton.jit
def merge_tokens_kernel(
    x_ptr,  # [B, N, D], any strides
    order_ptr,  # [B, N] int64: tokens sorted by group
    weight_ptr,  # [B, N] fp32 in token order, or unused
    start_ptr,  # [B, K + 1] int64: where each group starts in `order`
    out_ptr,  # [B, K, D]
    stride_b,
    stride_n,
    stride_d,
    N,
    K,
    D,
    HAS_WEIGHT: tl.constexpr,
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
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        o_j = start + tl.arange(0, BLOCK_N)
        m_j = o_j < end
        o_n = tl.load(order_ptr + i_b * N + o_j, mask=m_j, other=0)
        p_x = x_ptr + i_b * stride_b + o_n[:, None] * stride_n + o_d[None, :] * stride_d
        rows = tl.load(p_x, mask=m_j[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + i_b * N + o_n, mask=m_j, other=0.0)
            rows = rows * weight[:, None]  # [BLOCK_N, BLOCK_D]
        total += tl.sum(rows, axis=0)
    tl.store(out_ptr + (i_b * K + i_k) * D + o_d, total.to(out_ptr.dtype.element_ty), mask=m_d)


def launch_rule(N: int, K: int) -> Rule:
    """Blocks as deep as the mean group, so that small groups waste no lanes."""
    mean = ceil_div(N, K)
    block_n = 1 if mean <= 1 else 4 if mean <= 8 else 16
    return {"BLOCK_N": block_n, "BLOCK_D": min(1024, 2048 // block_n), "num_warps": 4}


def _launch_merge(x: Tensor, assign: Tensor, weight: Tensor | None, num_keep: int) -> Tensor:
    B, N, D = x.shape
    out = torch.empty(B, num_keep, D, dtype=store_dtype(x.dtype), device=x.device)
    if out.numel():
        # sorting keeps the strides of `assign`
        group, order = (t.contiguous() for t in assign.sort(dim=1, stable=True))
        bounds = torch.arange(num_keep + 1, device=x.device).expand(B, -1).contiguous()
        start = torch.searchsorted(group, bounds)
        rule = launch_rule(N, num_keep)
        launch(
            merge_tokens_kernel,
            B * num_keep * ceil_div(D, rule["BLOCK_D"]),
            x,
            order,
            None if weight is None else weight.float().contiguous(),
            start,
            out,
            *x.stride(),
            N,
            num_keep,
            D,
            HAS_WEIGHT=weight is not None,
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
        # [B, N, D]: what each token's group received
        rows = grad[batch, torch.where(inside, assign, 0)].float() * inside[..., None]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows if weight is None else rows * weight.float()[..., None]).to(x.dtype)
        if ctx.needs_input_grad[2]:
            grad_weight = (rows * x.float()).sum(-1).to(weight.dtype)
        return grad_x, None, grad_weight, None


def merge_tokens_triton(x: Tensor, assign: Tensor, weight: Tensor | None, num_keep: int) -> Tensor:
    """Launch the kernel, with autograd; arguments as in `merge_tokens`, already checked there."""
    out: Tensor = _MergeTokens.apply(x, assign, weight, num_keep)
    return out
