"""`cover_select` in Triton: one product of all tokens, and one launch for all steps.

Each program computes the gains of some tokens, a row of cosines each; programs meet between steps.
Bound by the cache, through which all cosines go once a step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispress_kernels._greedy import meet, read_best, together
from vispress_kernels._launch import Rule, ceil_div, launch, next_power_of_2
from vispress_kernels._products import products_triton
from vispress_kernels.assign_nearest.reference import first_equal, unit_rows
from vispress_kernels.products import samples_together

MOST = 4096
"""Tokens whose state each program keeps in its registers."""
MOST_PROGRAMS = 128
"""Of a sample."""


@triton.jit(do_not_specialize=["B", "N", "K", "P", "rows"])
def cover_kernel(
    cosine_ptr,  # [B, N, N] fp32
    fit_ptr,  # [B, N] fp32
    first_ptr,  # [B, N] fp32: 1, or 0 where an equal token stands before
    value_ptr,  # [2, B, P] fp32: the best of each program, by turns
    index_ptr,  # [2, B, P] int32
    count_ptr,  # [B] int32, zeros: how often programs of a sample met
    order_ptr,  # [B, K] int64
    gain_ptr,  # [B, K] fp32
    B,
    N,
    K,
    P,
    rows,  # tokens a program has
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least N
):
    pid = tl.program_id(0)
    # int64 before any multiply
    i_p = (pid % P).to(tl.int64)
    i_b = (pid // P).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < N
    cosine_ptr += i_b * N * N
    best = tl.zeros((BLOCK_N,), tl.float32)  # similarity to the closest taken token
    taken = tl.zeros((BLOCK_N,), tl.int32)
    for step in range(K):
        top = tl.full((), float("-inf"), tl.float32)
        top_n = tl.full((), 2**31 - 1, tl.int32)
        for i in range(rows):
            y = i_p * rows + i
            at_y = tl.minimum(y, N - 1)
            row = tl.load(cosine_ptr + at_y * N + o_n, mask=m_n, other=-1.0)
            row = (row + 1.0) / 2.0 * tl.load(first_ptr + i_b * N + at_y)
            apart = tl.where(row < 0.0, 0.0, row) - best
            apart = tl.where(apart < 0.0, 0.0, apart)  # a NaN stays one
            gain = tl.sum(apart, axis=0) + tl.load(fit_ptr + i_b * N + at_y)
            gain = tl.where(gain == gain, gain, float("inf"))
            open_y = (y < N) & (tl.sum(tl.where(o_n == y, taken, 0), axis=0) == 0)
            better = open_y & (gain > top)
            top = tl.where(better, gain, top)
            top_n = tl.where(better, y.to(tl.int32), top_n)
        at = (step % 2 * B.to(tl.int64) + i_b) * P
        tl.store(value_ptr + at + i_p, top)
        tl.store(index_ptr + at + i_p, top_n)
        meet(count_ptr + i_b, (step + 1) * P)
        top, pick = read_best(value_ptr + at, index_ptr + at, P, BLOCK_P)
        tl.store(order_ptr + i_b * K + step, pick, mask=i_p == 0)
        top = tl.where(top == float("inf"), float("nan"), top)
        tl.store(gain_ptr + i_b * K + step, top, mask=i_p == 0)
        row = tl.load(cosine_ptr + pick * N + o_n, mask=m_n, other=-1.0)
        row = (row + 1.0) / 2.0 * tl.load(first_ptr + i_b * N + pick)
        best = tl.where(row <= best, best, row)
        taken = tl.where(o_n == pick, 1, taken)


def cover_rule(N: int) -> Rule:
    """All tokens in one block, at most eight a thread."""
    block = max(512, next_power_of_2(N))
    return {"BLOCK_P": MOST_PROGRAMS, "BLOCK_N": block, "num_warps": max(4, block // 256)}


def cover_select_triton(x: Tensor, fit: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    """Launch the kernel, for as many samples at a time as find room; returns as the reference."""
    B, N, _ = x.shape
    at_a_time = min(B, samples_together(x))
    while not together(at_a_time, x.device):  # all programs of a launch run at once
        at_a_time = ceil_div(at_a_time, 2)
    order = torch.empty(B, num_keep, dtype=torch.int64, device=x.device)
    gain = torch.empty(B, num_keep, dtype=torch.float32, device=x.device)
    for start in range(0, B, at_a_time):
        part = slice(start, start + at_a_time)
        own, fits = x[part], fit[part].float().contiguous()
        # equal tokens wait for the first, however their products are rounded
        place = torch.arange(N, device=x.device)
        first = (first_equal(unit_rows(own)) == place).float()
        b = len(own)
        rows = ceil_div(N, min(together(b, x.device), MOST_PROGRAMS))
        P = ceil_div(N, rows)
        value = torch.empty(2, b, P, dtype=torch.float32, device=x.device)
        index = torch.empty(2, b, P, dtype=torch.int32, device=x.device)
        count = torch.zeros(b, dtype=torch.int32, device=x.device)
        given = (products_triton(own), fits, first, value, index, count)
        launch(
            cover_kernel, b * P, *given, order[part], gain[part], b, N, num_keep, P, rows,
            **cover_rule(N), launch_cooperative_grid=True, on=x,
        )  # fmt: skip
    return order, gain
