"""`column_attention` in two Triton launches: each row's peak and sum, then each column's mean.

Bound by the tensor cores: q k^T is computed twice and stored never. In both passes a program keeps
one block of heads and walks the other side in order, so sums stay within a thread until the end and
nothing is added atomically. Only blocks at a mask's edge are masked. Exponents have base 2.

Weights of a row add up to 1 whatever the size of its logits: peak and sum stay apart (their
log-sum-exp is rounded to units of the peak), a product is compared with the peak before it is
scaled (no rounding, and nothing that a compiler may fuse in one launch and not in the other), and
both launches compute the same products to the bit.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispress_kernels._heads import dot_heads, head_rule, load_part
from vispress_kernels._launch import Rule, ceil_div, dot_operand, launch, next_power_of_2
from vispress_kernels.column_attention._tiles import (
    allowed_places,
    at_most_0,
    column_products,
    reach,
    rescaled,
)
from vispress_kernels.column_attention.reference import query_counts

FEW_PROGRAMS = 264  # two for each multiprocessor of a large device


@triton.jit
def row_stats_kernel(
    q_ptr,  # [B, H, S, Dh], any strides
    k_ptr,  # [B, Hk, S, Dh], any strides
    bounds_ptr,  # [2, S] int64: start and end of each position's segment, or unused
    valid_ptr,  # [B, S] uint8, or unused
    stats_ptr,  # [B, H, S, 2] fp32: the largest product of each row, one over its sum of weights
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    scale,  # at least 0, with log2(e) in it
    H,
    S,
    GROUP,  # query heads a key head
    HEAD: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    CHUNKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(S, BLOCK_M)
    # int64 before any multiply
    first = (pid % blocks).to(tl.int64) * BLOCK_M
    i_bh = (pid // blocks).to(tl.int64)
    i_b = (pid // blocks // H).to(tl.int64)
    i_h = ((pid // blocks) % H).to(tl.int64)
    o_m = first + tl.arange(0, BLOCK_M)
    m_m = o_m < S
    p_m = q_ptr + i_b * stride_qb + i_h * stride_qh + o_m * stride_qs
    steps = tl.arange(0, BLOCK_N).to(tl.int64)
    p_n = k_ptr + i_b * stride_kb + (i_h // GROUP) * stride_kh + steps * stride_ks
    p_valid = valid_ptr
    if HAS_VALID:
        p_valid += i_b * S
    q, q_rest = 0, 0
    if not CHUNKED:
        q = load_part(p_m, stride_qd, m_m, HEAD, 0, BLOCK_D, False)
        if REST:
            q_rest = load_part(p_m, stride_qd, m_m, HEAD, BLOCK_D, REST, False)
    low, high, begin, full, end = reach(
        o_m, m_m, first, S, bounds_ptr, CAUSAL, HAS_BOUNDS, HAS_VALID, BLOCK_M, BLOCK_N
    )
    if CAUSAL:
        high = tl.minimum(high, o_m.to(tl.int32) + 1)
        end = tl.minimum(end, first + BLOCK_M)
    if HAS_VALID:  # an invalid row meets nobody
        high = tl.where(tl.load(p_valid + o_m, mask=m_m, other=0) != 0, high, low)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, full, BLOCK_N):
        dot = dot_heads(
            q, q_rest, p_m, p_n + start * stride_ks, stride_qd, stride_kd, m_m, steps < S,
            HEAD, CHUNKED, BLOCK_M, BLOCK_N, BLOCK_D, REST, True,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(dot, axis=1))
        total *= rescaled(peak, new_peak, scale)
        total += tl.sum(tl.exp2((dot - new_peak[:, None]) * scale), axis=1)
        peak = new_peak
    for start in range(full, end, BLOCK_N):
        dot = dot_heads(
            q, q_rest, p_m, p_n + start * stride_ks, stride_qd, stride_kd, m_m, start + steps < S,
            HEAD, CHUNKED, BLOCK_M, BLOCK_N, BLOCK_D, REST, False,
        )  # fmt: skip
        allowed = allowed_places(low, high, start, p_valid, S, HAS_VALID, BLOCK_N)
        new_peak = tl.maximum(peak, tl.max(tl.where(allowed, dot, float("-inf")), axis=1))
        total *= rescaled(peak, new_peak, scale)
        # what is not allowed may be far above
        weights = tl.exp2(at_most_0((dot - new_peak[:, None]) * scale))
        total += tl.sum(tl.where(allowed, weights, 0.0), axis=1)
        peak = new_peak
    p_stats = stats_ptr + (i_bh * S + o_m) * 2
    tl.store(p_stats, peak, mask=m_m)
    # a row without keys, an invalid one, is met by no column
    tl.store(p_stats + 1, 1.0 / tl.where(total == 0.0, 1.0, total), mask=m_m)


@triton.jit
def column_mean_kernel(
    q_ptr,  # [B, H, S, Dh], any strides
    k_ptr,  # [B, Hk, S, Dh], any strides
    bounds_ptr,  # [2, S] int64, or unused
    valid_ptr,  # [B, S] uint8, or unused
    stats_ptr,  # [B, H, S, 2] fp32, of `row_stats_kernel`
    count_ptr,  # [B, S] int64: queries averaged over, or unused without `valid`
    out_ptr,  # [B, H, S] fp32
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_cb,
    stride_cs,
    scale,  # at least 0, with log2(e) in it
    H,
    S,
    GROUP,  # query heads a key head
    HEAD: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    CHUNKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST: tl.constexpr,
):
    # keys are kept and queries walked; in chunks by blocks that make the tiles of the first launch
    KEEP: tl.constexpr = BLOCK_N if CHUNKED else BLOCK_M
    WALK: tl.constexpr = BLOCK_M if CHUNKED else BLOCK_N
    pid = tl.program_id(0)
    blocks = tl.cdiv(S, KEEP)
    # int64 before any multiply
    first = (pid % blocks).to(tl.int64) * KEEP
    i_bh = (pid // blocks).to(tl.int64)
    i_b = (pid // blocks // H).to(tl.int64)
    i_h = ((pid // blocks) % H).to(tl.int64)
    o_m = first + tl.arange(0, KEEP)  # keys: their sums over queries are sums along a row
    m_m = o_m < S
    p_m = k_ptr + i_b * stride_kb + (i_h // GROUP) * stride_kh + o_m * stride_ks
    steps = tl.arange(0, WALK).to(tl.int64)
    p_n = q_ptr + i_b * stride_qb + i_h * stride_qh + steps * stride_qs
    p_stats = stats_ptr + (i_bh * S + steps) * 2
    p_valid = valid_ptr
    if HAS_VALID:
        p_valid += i_b * S
    k, k_rest = 0, 0
    if not CHUNKED:
        k = load_part(p_m, stride_kd, m_m, HEAD, 0, BLOCK_D, False)
        if REST:
            k_rest = load_part(p_m, stride_kd, m_m, HEAD, BLOCK_D, REST, False)
    low, high, begin, full, end = reach(
        o_m, m_m, first, S, bounds_ptr, CAUSAL, HAS_BOUNDS, HAS_VALID, KEEP, WALK
    )
    count = tl.maximum(high - low, 1)
    if CAUSAL:
        low = tl.maximum(low, o_m.to(tl.int32))
        full = tl.maximum(begin, first)
    if HAS_VALID:  # an invalid row meets nobody
        high = tl.where(tl.load(p_valid + o_m, mask=m_m, other=0) != 0, high, low)
    total = tl.zeros((KEEP,), tl.float32)
    if not CAUSAL:
        for start in range(begin, full, WALK):
            peak = tl.load(p_stats + 2 * start)  # ahead of the product, which hides it
            share = tl.load(p_stats + 2 * start + 1)
            dot = column_products(
                k, k_rest, p_m, p_n + start * stride_qs, stride_kd, stride_qd, m_m, steps < S,
                HEAD, CHUNKED, KEEP, WALK, BLOCK_D, REST, True,
            )  # fmt: skip
            # no weight is above 1, should a device round products by their place
            weights = tl.exp2(at_most_0((dot - peak[None, :]) * scale))
            total += tl.sum(weights * share[None, :], axis=1)
    for start in range(full, end, WALK):
        m_n = start + steps < S
        peak = tl.load(p_stats + 2 * start, mask=m_n, other=0.0)
        share = tl.load(p_stats + 2 * start + 1, mask=m_n, other=0.0)
        dot = column_products(
            k, k_rest, p_m, p_n + start * stride_qs, stride_kd, stride_qd, m_m, m_n,
            HEAD, CHUNKED, KEEP, WALK, BLOCK_D, REST, False,
        )  # fmt: skip
        allowed = allowed_places(low, high, start, p_valid, S, HAS_VALID, WALK)
        weights = tl.exp2(at_most_0((dot - peak[None, :]) * scale))
        total += tl.sum(tl.where(allowed, weights * share[None, :], 0.0), axis=1)
    if HAS_VALID:
        count = tl.load(count_ptr + i_b * stride_cb + o_m * stride_cs, mask=m_m, other=1)
        count = tl.maximum(count, 1)
    total = total / count.to(tl.float32)
    tl.store(out_ptr + i_bh * S + o_m, total, mask=m_m)


def launch_rule(Dh: int, itemsize: int, programs: int = FEW_PROGRAMS) -> Rule:
    """Blocks for heads of Dh, kept (M) and walked (N).

    `programs` is how many blocks of 128 rows one sample has: where they are few, blocks are halved.
    """
    rule = head_rule(Dh, itemsize)
    if rule["CHUNKED"]:
        return {"BLOCK_M": 16, **rule, "REST": 0}
    # heads of 72 or 80 as 64 + 16, not as 128
    main = max(64, 1 << (Dh.bit_length() - 1))
    rest = 0 if Dh <= main else max(16, next_power_of_2(Dh - main))
    if rest >= main:
        main, rest = 2 * main, 0
    wide = programs >= FEW_PROGRAMS and main + rest <= 128
    # blocks of 128 keys take twice the registers, which leaves one program a multiprocessor
    rule |= {"BLOCK_M": 128 if wide else 64, "BLOCK_D": main, "REST": rest}
    rule |= {"num_warps": 4, "num_stages": 3 if main + rest <= 128 else 2}
    return rule


def column_attention_triton(
    q: Tensor,
    k: Tensor,
    bounds: Tensor | None,
    valid: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """Launch the kernels; arguments as in `column_attention_reference`."""
    B, H, S, Dh = q.shape
    out = torch.empty(B, H, S, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    stats = torch.empty(B, H, S, 2, dtype=torch.float32, device=q.device)
    counts = None if valid is None else query_counts(bounds, valid, q)
    valid = None if valid is None else valid.contiguous().view(torch.uint8)
    rule = launch_rule(Dh, q.element_size(), H * ceil_div(S, 128))
    if scale < 0:  # the largest product is the largest logit
        q, scale = -q, -scale
    q, k = dot_operand(q), dot_operand(k)
    options: dict[str, Any] = {
        "HEAD": Dh,
        "CAUSAL": causal,
        "HAS_BOUNDS": bounds is not None,
        "HAS_VALID": valid is not None,
        **rule,
        "on": q,
    }
    rows, columns = rule["BLOCK_M"], rule["BLOCK_N"] if rule["CHUNKED"] else rule["BLOCK_M"]
    strides = (*q.stride(), *k.stride())
    count_strides = (0, 0) if counts is None else counts.stride()
    sizes = (scale * math.log2(math.e), H, S, H // k.shape[1])
    launch(
        row_stats_kernel, B * H * ceil_div(S, rows), q, k, bounds, valid, stats,
        *strides, *sizes, **options,
    )  # fmt: skip
    launch(
        column_mean_kernel, B * H * ceil_div(S, columns), q, k, bounds, valid, stats, counts, out,
        *strides, *count_strides, *sizes, **options,
    )  # fmt: skip
    return out
