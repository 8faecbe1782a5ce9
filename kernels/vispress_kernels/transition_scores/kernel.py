"""`transition_scores` in one Triton launch: a program reads some rows of both tensors once.

Memory-bound: 2 * D elements in and two fp32 numbers out for every row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispress_kernels._launch import Rule, ceil_div, launch
from vispress_kernels.transition_scores.reference import EPS


@triton.jit(do_not_specialize=["N"])
def transition_scores_kernel(
    x_ptr,  # [B, N, D], any strides
    y_ptr,  # [B, N, D], any strides
    magnitude_ptr,  # [B, N] fp32
    cosine_ptr,  # [B, N] fp32
    stride_xb,
    stride_xn,
    stride_xd,
    stride_yb,
    stride_yn,
    stride_yd,
    N,
    D,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    # int64 before any multiply
    i_b = (pid // blocks).to(tl.int64)
    o_n = ((pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_n = o_n < N
    xx = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    yy = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    xy = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = m_n[:, None] & (o_d < D)[None, :]
        p_x = x_ptr + i_b * stride_xb + o_n[:, None] * stride_xn + o_d[None, :] * stride_xd
        p_y = y_ptr + i_b * stride_yb + o_n[:, None] * stride_yn + o_d[None, :] * stride_yd
        x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(p_y, mask=mask, other=0.0).to(tl.float32)
        xx += x * x
        yy += y * y
        xy += x * y
    x_norm = tl.sqrt(tl.sum(xx, axis=1))
    y_norm = tl.sqrt(tl.sum(yy, axis=1))
    # a NaN stays one
    x_safe = tl.where(x_norm < EPS, EPS, x_norm)
    cosine = tl.sum(xy, axis=1) / x_safe / tl.where(y_norm < EPS, EPS, y_norm)
    tl.store(magnitude_ptr + i_b * N + o_n, y_norm / x_safe, mask=m_n)
    tl.store(cosine_ptr + i_b * N + o_n, cosine, mask=m_n)


def launch_rule(D: int) -> Rule:
    """A row a program, 16 bytes of it a thread at a time; several rows where they are short."""
    if D > 512:
        return {"BLOCK_N": 1, "BLOCK_D": 512, "num_warps": 2}
    return {"BLOCK_N": 16, "BLOCK_D": 128, "num_warps": 4}


def transition_scores_triton(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments as in `transition_scores`, already checked there."""
    shape, D = x.shape[:-1], x.shape[-1]
    if x.dim() != 3:
        x, y = x.reshape(1, shape.numel(), D), y.reshape(1, shape.numel(), D)
    B, N = x.shape[:2]
    magnitude = torch.empty(shape, dtype=torch.float32, device=x.device)
    cosine = torch.empty(shape, dtype=torch.float32, device=x.device)
    if magnitude.numel():
        rule = launch_rule(D)
        launch(
            transition_scores_kernel,
            B * ceil_div(N, rule["BLOCK_N"]),
            x,
            y,
            magnitude,
            cosine,
            *x.stride(),
            *y.stride(),
            N,
            D,
            EPS=EPS,
            **rule,
            on=x,
        )
    return magnitude, cosine
