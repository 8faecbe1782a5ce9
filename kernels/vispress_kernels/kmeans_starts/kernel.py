"""`kmeans_starts` in Triton: one product of all tokens, and a program a sample takes all steps."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispress_kernels._launch import launch
from vispress_kernels._products import products_triton
from vispress_kernels.maxmin_select.kernel import MOST, held_rule
from vispress_kernels.products import samples_together

__all__ = ["MOST", "kmeans_starts_triton"]


@triton.jit(do_not_specialize=["N", "K"])
def kmeans_starts_kernel(
    cosine_ptr,  # [B, N, N] fp32
    drawn_ptr,  # [K] fp64
    order_ptr,  # [B, K] int64
    N,
    K,
    BLOCK_N: tl.constexpr,  # at least N
):
    # one program takes all steps of a sample; a step reads one row, which is in the cache
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < N
    cosine_ptr += i_b * N * N
    distance = tl.where(m_n, float("inf"), 0.0)
    pick = tl.minimum((tl.load(drawn_ptr) * N).to(tl.int64), N - 1)
    tl.store(order_ptr + i_b * K, pick)
    for step in range(1, K):
        apart = 1.0 - tl.load(cosine_ptr + pick * N + o_n, mask=m_n, other=1.0)
        apart = tl.where(apart < 0.0, 0.0, apart)
        distance = tl.where(apart > distance, distance, apart)  # a NaN stays one
        mass = tl.cumsum(distance * distance, axis=0)
        part = tl.load(drawn_ptr + step).to(tl.float32)
        reached = tl.sum(tl.where(o_n == N - 1, mass, 0.0), axis=0) * part
        # what is behind the others falls to the last token
        pick = tl.sum(((o_n < N - 1) & (mass <= reached)).to(tl.int32), axis=0).to(tl.int64)
        tl.store(order_ptr + i_b * K + step, pick)


def kmeans_starts_triton(x: Tensor, drawn: Tensor) -> Tensor:
    """Launch the kernel, for as many samples at a time as may hold their cosines."""
    B, N, _ = x.shape
    order = torch.empty(B, len(drawn), dtype=torch.int64, device=x.device)
    at_a_time, drawn = samples_together(x), drawn.contiguous()
    for start in range(0, B, at_a_time):
        part = slice(start, start + at_a_time)
        own = x[part]
        launch(
            kmeans_starts_kernel, len(own), products_triton(own), drawn, order[part], N, len(drawn),
            **held_rule(N), on=x,
        )  # fmt: skip
    return order
