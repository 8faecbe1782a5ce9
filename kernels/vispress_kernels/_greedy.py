"""Triton helpers of the greedy selections. Imported by their kernels only: this imports triton.

A greedy selection is one launch a step and no host sync: each program first finds the step's token
among the bests that the programs of the launch before left, then updates its own tokens and leaves
their best. Bests are double-buffered, so no program reads what another writes in the same launch.
"""

import triton
import triton.language as tl

MAX_BESTS = 1024


@triton.jit
def read_best(value_ptr, index_ptr, P, BLOCK_P: tl.constexpr):
    """The largest of P values and its index; the lowest index among equals."""
    o_p = tl.arange(0, BLOCK_P)
    m_p = o_p < P
    values = tl.load(value_ptr + o_p, mask=m_p, other=float("-inf"))
    indices = tl.load(index_ptr + o_p, mask=m_p, other=0)
    top = tl.max(values, axis=0)
    return top, tl.min(tl.where(m_p & (values == top), indices, 2**31 - 1), axis=0).to(tl.int64)


@triton.jit
def fold_best(score, o_n, best, best_n):
    """The best of a block of scores and of what earlier blocks had."""
    top = tl.max(score, axis=0)
    top_n = tl.min(tl.where(score == top, o_n, 2**31 - 1), axis=0).to(tl.int32)
    better = top > best
    return tl.where(better, top, best), tl.where(better, top_n, best_n)


@triton.jit
def dot_with_row(p_x, p_row, stride_d, m_n, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Products of BLOCK_N rows with one row, in fp32."""
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        m_d = o_d < D
        mask = m_n[:, None] & m_d[None, :]
        x = tl.load(p_x[:, None] + o_d[None, :] * stride_d, mask=mask, other=0.0)
        row = tl.load(p_row + o_d * stride_d, mask=m_d, other=0.0)
        total += x.to(tl.float32) * row.to(tl.float32)[None, :]
    return tl.sum(total, axis=1)
