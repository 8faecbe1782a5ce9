"""`dct_lowpass` in one Triton launch: both products of a tile of the new grid for some channels.

Memory-bound: reads the grid once for each tile of 32 x 32 new tokens (once in all for the usual
sizes, then from cache) and writes each new token once. Both products run on the matrix units.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vispress_kernels._backend import interpreting, needs_grad
from vispress_kernels._launch import Rule, ceil_div, launch, next_power_of_2, store_dtype


@triton.jit
def _split_dot(a, b, total, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr, dtype: tl.constexpr):
    """`a b + total` of fp32 operands, each as one or two numbers of 16 bits."""
    a_high = a.to(dtype)
    b_high = b.to(dtype)
    if A_PARTS == 2:
        a_low = (a.to(tl.float32) - a_high.to(tl.float32)).to(dtype)
        total = tl.dot(a_low, b_high, total)
    if B_PARTS == 2:
        b_low = (b.to(tl.float32) - b_high.to(tl.float32)).to(dtype)
        total = tl.dot(a_high, b_low, total)
    return tl.dot(a_high, b_high, total)


@triton.jit
def _rows_product(
    p_x,  # first row's addresses [BLOCK_W * BLOCK_C]
    rows_ptr,
    narrow,  # [BLOCK_P, BLOCK_W * BLOCK_C] fp32
    o_p,
    h,
    m_x,
    stride_h,
    H,
    P,
    BLOCK_H: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Add `rows X` of BLOCK_H rows of the grid from h on."""
    o_h = h + tl.arange(0, BLOCK_H)
    m_h = o_h < H
    rows = tl.load(
        rows_ptr + o_p[:, None] * H + o_h[None, :],
        mask=(o_p < P)[:, None] & m_h[None, :],
        other=0.0,
    )  # [BLOCK_P, BLOCK_H]
    x = tl.load(
        p_x[None, :] + o_h.to(tl.int64)[:, None] * stride_h,
        mask=m_h[:, None] & m_x[None, :],
        other=0.0,
    )  # [BLOCK_H, BLOCK_W * BLOCK_C]
    if SPLIT:  # x is exact in its own 16 bits
        return _split_dot(rows, x, narrow, 2, 1, x.dtype)
    return tl.dot(rows, x.to(tl.float32), narrow, input_precision="tf32x3")


@triton.jit(do_not_specialize=["H", "W", "P", "Q"])
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
    ONE_H: tl.constexpr,  # H <= BLOCK_H
    SPLIT: tl.constexpr,  # operands as 16-bit numbers and their remainders
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks_q = tl.cdiv(Q, BLOCK_Q)
    blocks_p = tl.cdiv(P, BLOCK_P)
    # tiles that read the same tokens run together. int64 before any multiply: B*N*C passes 2**31
    i_q = (pid % blocks_q).to(tl.int64)
    i_p = ((pid // blocks_q) % blocks_p).to(tl.int64)
    i_c = ((pid // blocks_q // blocks_p) % blocks_c).to(tl.int64)
    i_b = (pid // blocks_q // blocks_p // blocks_c).to(tl.int64)
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    o_wc = tl.arange(0, BLOCK_W * BLOCK_C)
    o_c = i_c * BLOCK_C + o_wc % BLOCK_C
    m_c = o_c < C
    # a stride of 1 is handed in as a constant, which has no `to`
    stride_h = (tl.zeros((), tl.int64) + stride_n) * W
    p_x = x_ptr + i_b * stride_b + o_c * stride_c
    total = tl.zeros((BLOCK_Q, BLOCK_P * BLOCK_C), tl.float32)
    for w in range(0, W, BLOCK_W):
        o_w = w + o_wc // BLOCK_C
        m_x = m_c & (o_w < W)
        p_w = p_x + o_w.to(tl.int64) * stride_n
        narrow = tl.zeros((BLOCK_P, BLOCK_W * BLOCK_C), tl.float32)
        if ONE_H:
            narrow = _rows_product(
                p_w, rows_ptr, narrow, o_p, 0, m_x, stride_h, H, P, BLOCK_H, SPLIT
            )
        else:
            for h in range(0, H, BLOCK_H):
                narrow = _rows_product(
                    p_w, rows_ptr, narrow, o_p, h, m_x, stride_h, H, P, BLOCK_H, SPLIT
                )
        narrow = tl.reshape(narrow, (BLOCK_P, BLOCK_W, BLOCK_C)).permute(1, 0, 2)
        narrow = tl.reshape(narrow, (BLOCK_W, BLOCK_P * BLOCK_C))
        o_k = w + tl.arange(0, BLOCK_W)
        columns = tl.load(
            columns_ptr + o_q[:, None] * W + o_k[None, :],
            mask=(o_q < Q)[:, None] & (o_k < W)[None, :],
            other=0.0,
        )  # [BLOCK_Q, BLOCK_W]
        if SPLIT:
            total = _split_dot(columns, narrow, total, 2, 2, tl.bfloat16)
        else:
            total = tl.dot(columns, narrow, total, input_precision="tf32x3")
    o_pc = tl.arange(0, BLOCK_P * BLOCK_C)
    o_p = i_p * BLOCK_P + o_pc // BLOCK_C
    o_c = i_c * BLOCK_C + o_pc % BLOCK_C
    mask = (o_q < Q)[:, None] & ((o_p < P) & (o_c < C))[None, :]
    p_out = out_ptr + ((i_b * P + o_p) * Q * C + o_c)[None, :] + o_q[:, None] * C
    tl.store(p_out, total.to(out_ptr.dtype.element_ty), mask=mask)


def launch_rule(H: int, P: int, Q: int, element_size: int) -> Rule:
    """The new grid in one tile of up to 32 x 32, the height of the old one in one block if it fits.

    A block's channels are the 32 bytes that memory moves at least, but for heights that leave no
    registers for them.
    """
    height = max(16, next_power_of_2(H))
    tall = height > (64 if element_size == 4 else 128)
    small = max(P, Q) <= 16 and (tall or height * element_size <= 128)
    return {
        "BLOCK_P": 16 if P <= 16 else 32,
        "BLOCK_Q": 16 if Q <= 16 else 32,
        "BLOCK_H": 32 if tall else height,
        "BLOCK_W": 16,
        "BLOCK_C": 8 if height == 128 else 32 // element_size,
        "num_warps": 4 if small else 8,
        # as many as 99 KB hold
        "num_stages": 3 if height <= 64 and element_size == 2 else 2,
    }


def _launch_dct(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    B, _, C = x.shape
    P, H = rows.shape
    Q, W = columns.shape
    out = torch.empty(B, P * Q, C, dtype=store_dtype(x.dtype), device=x.device)
    rule = launch_rule(H, P, Q, x.element_size())
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
        ONE_H=rule["BLOCK_H"] >= H,
        # the interpreter multiplies the bit patterns of bf16
        SPLIT=x.element_size() == 2 and not interpreting(),
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
    if not needs_grad(x):
        return _launch_dct(x, rows, columns)
    out: Tensor = _DctLowpass.apply(x, rows, columns)
    return out
