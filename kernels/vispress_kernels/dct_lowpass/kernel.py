"""`dct_lowpass` in one Triton launch: both products of a tile of the new grid for some channels.

Memory-bound: reads the grid once for each tile of 16 x 16 new tokens (once in all for the usual
sizes, then from cache) and writes each new token once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vispress_kernels._launch import Rule, ceil_div, launch, store_dtype


@triton.jit
def dct_lowpass_kernel(
    x_ptr,  # [B, H * W, C], any strides
    rows_ptr,  # [P, H] fp32
    columns_ptr,  # [Q, W] fp32
    out_ptr,  # [B, P * Q, C], contiguous
    stride_b,
    stride_n,
    stride_c,
    H,
    W,
    P,
    Q,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks_q = tl.cdiv(Q, BLOCK_Q)
    blocks_p = tl.cdiv(P, BLOCK_P)
    # int64 before any multiply: B*N*C passes 2**31 for video
    i_c = (pid % blocks_c).to(tl.int64)
    i_q = ((pid // blocks_c) % blocks_q).to(tl.int64)
    i_p = ((pid // blocks_c // blocks_q) % blocks_p).to(tl.int64)
    i_b = (pid // blocks_c // blocks_q // blocks_p).to(tl.int64)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    m_c = o_c < C
    m_q = o_q < Q
    m_p = o_p < P
    p_x = x_ptr + i_b * stride_b + o_c[None, :] * stride_c
    out = tl.zeros((BLOCK_P, BLOCK_Q, BLOCK_C), tl.float32)
    first = tl.zeros((), tl.int64)  # token at the start of row h
    for h in range(H):
        narrow = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
        for start in range(0, W, BLOCK_W):
            o_w = start + tl.arange(0, BLOCK_W)
            m_w = o_w < W
            o_n = first + o_w
            x = tl.load(
                p_x + o_n[:, None] * stride_n, mask=m_w[:, None] & m_c[None, :], other=0.0
            )  # [BLOCK_W, BLOCK_C]
            columns = tl.load(
                columns_ptr + o_q[:, None] * W + o_w[None, :],
                mask=m_q[:, None] & m_w[None, :],
                other=0.0,
            )  # [BLOCK_Q, BLOCK_W]
            narrow = tl.dot(columns, x.to(tl.float32), narrow, input_precision="ieee")
        rows = tl.load(rows_ptr + o_p * H + h, mask=m_p, other=0.0)
        out += rows[:, None, None] * narrow[None, :, :]
        first += W
    o_n = o_p[:, None, None] * Q + o_q[None, :, None]
    mask = m_p[:, None, None] & m_q[None, :, None] & m_c[None, None, :]
    p_out = out_ptr + (i_b * P * Q + o_n) * C + o_c[None, None, :]
    tl.store(p_out, out.to(out_ptr.dtype.element_ty), mask=mask)


def launch_rule() -> Rule:
    """One tile size for all shapes: 32 fp32 accumulators a thread; one stage, as two spill."""
    return {
        "BLOCK_P": 16,
        "BLOCK_Q": 16,
        "BLOCK_W": 32,
        "BLOCK_C": 32,
        "num_warps": 8,
        "num_stages": 1,
    }


def _launch_dct(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    B, _, C = x.shape
    P, H = rows.shape
    Q, W = columns.shape
    out = torch.empty(B, P * Q, C, dtype=store_dtype(x.dtype), device=x.device)
    rule = launch_rule()
    blocks = ceil_div(P, rule["BLOCK_P"]) * ceil_div(Q, rule["BLOCK_Q"])
    launch(
        dct_lowpass_kernel,
        B * blocks * ceil_div(C, rule["BLOCK_C"]),
        x,
        rows.contiguous(),
        columns.contiguous(),
        out,
        *x.stride(),
        H,
        W,
        P,
        Q,
        C,
        **rule,
        on=x,
    )
    return out.to(x.dtype)


class _DctLowpass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(rows, columns)
        return _launch_dct(x, rows, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, columns = ctx.saved_tensors
        # the map is linear: its transpose is the same kernel with both matrices transposed
        return _launch_dct(grad, rows.mT, columns.mT), None, None


def dct_lowpass_triton(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Launch the kernel, with autograd; arguments as in `dct_lowpass_reference`."""
    out: Tensor = _DctLowpass.apply(x, rows, columns)
    return out
