"""Triton helpers of the greedy selections. Imported by their kernels only: this imports triton.

A selection has steps: each program finds the step's token among the bests that all programs left
in the step before, updates its own tokens and leaves their best. Bests are double-buffered, so that
no program reads what another writes in the same step. One launch runs all steps where its programs
fit on the device together: they meet between steps. Otherwise a step is a launch. No host syncs.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispress_kernels._backend import interpreting
from vispress_kernels._launch import Rule, ceil_div, next_power_of_2

MAX_BESTS = 1024


@triton.jit
def meet(count_ptr, expected):
    """Go on once programs have come here `expected` times; what they wrote before can be read."""
    tl.debug_barrier()  # a thread speaks for its program: the others' writes come first
    seen = tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") + 1
    while seen < expected:
        seen = tl.atomic_add(count_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def read_best(value_ptr, index_ptr, P, BLOCK_P: tl.constexpr):
    """The largest of P values and its index; the lowest index among equals."""
    o_p = tl.arange(0, BLOCK_P)
    m_p = o_p < P
    # other programs wrote them: past the first cache, which is not kept coherent
    values = tl.load(value_ptr + o_p, mask=m_p, other=float("-inf"), cache_modifier=".cg")
    indices = tl.load(index_ptr + o_p, mask=m_p, other=0, cache_modifier=".cg")
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


@triton.jit
def inverse_of_norms(
    p_x, stride_d, m_n, D, EPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One over the norm (at least EPS) of BLOCK_N rows, in fp32."""
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = m_n[:, None] & (o_d < D)[None, :]
        x = tl.load(p_x[:, None] + o_d[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
        total += x * x
    norm = tl.sqrt(tl.sum(total, axis=1))
    # a NaN stays one
    return 1.0 / tl.where(norm < EPS, EPS, norm)


def launch_rule(N: int, D: int) -> Rule:
    """Blocks of a step that is a launch: many small programs, until there are 1024 of them."""
    block_n = 8 if N <= 8 * MAX_BESTS else 16
    return {"BLOCK_N": block_n, "BLOCK_D": 256 if D > 128 else 128, "num_warps": 4}


def whole_rule(D: int, itemsize: int) -> Rule:
    """Blocks of a launch that runs all steps: rows whole, 128 bytes in flight a thread."""
    block_d = min(4096, max(64, next_power_of_2(D)))
    return {
        "BLOCK_N": min(8, 32768 // itemsize // block_d),
        "BLOCK_D": block_d,
        "num_warps": 8 if block_d > 256 else 4,
    }


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def together(B: int, device: torch.device) -> int:
    """Programs that each of B samples may have in one launch, so that all run at once; 0 for none.

    One a multiprocessor, where 256 threads find room whatever registers they take. Triton's
    interpreter runs programs one after the other: there, one that meets nobody.
    """
    if interpreting():
        return 1
    return min(MAX_BESTS, _multiprocessors(device) // max(B, 1))


def arrange(x: Tensor) -> tuple[bool, Rule, int, int]:
    """How the steps over tokens `[B, N, D]` are launched.

    Returns:
        Whether one launch runs all of them, its blocks, programs a sample, and the blocks of tokens
        each of them has.
    """
    B, N, D = x.shape
    most = together(B, x.device)
    rule = whole_rule(D, x.element_size()) if most else launch_rule(N, D)
    tiles = ceil_div(ceil_div(N, rule["BLOCK_N"]), most or MAX_BESTS)
    return most > 0, rule, ceil_div(N, tiles * rule["BLOCK_N"]), tiles
