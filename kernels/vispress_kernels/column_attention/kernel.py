"""`column_attention` in two Triton launches: each row's log-sum-exp, then each column's mean.

Bound by the tensor cores: q k^T is computed twice and stored never. In both passes a program keeps
one block of heads and walks the other side in order, so sums stay within a thread until the end and
nothing is added atomically. Only blocks at a mask's edge are masked. Exponents have base 2.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispress_kernels._heads import dot_in_chunks, head_rule, load_part
from vispress_kernels._launch import Rule, ceil_div, dot_operand, launch, next_power_of_2
from vispress_kernels.column_attention.reference import query_counts

FEW_PROGRAMS = 264  # two for each multiprocessor of a large device


@triton.jit
def _span(
    bounds_ptr,
    first,
    last,
    S,
    CAUSAL: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What rows `first` to `last` meet: `begin`, `end`, and where blocks that need no mask end."""
    begin = tl.zeros((), tl.int64)
    end = begin + S
    full = end // BLOCK_N * BLOCK_N
    if HAS_BOUNDS:
        begin = tl.load(bounds_ptr + first)
        end = tl.load(bounds_ptr + S + last - 1)
        # the same segment from the first row to the last
        alone = begin == tl.load(bounds_ptr + last - 1)
        full = tl.where(alone, begin + (end - begin) // BLOCK_N * BLOCK_N, begin)
    if CAUSAL or HAS_VALID:
        full = begin
    return begin, full, end


@triton.jit
def _dot(
    a,
    a_rest,
    p_a,
    p_b,
    stride_ad,
    stride_bd,
    m_a,
    m_b,
    HEAD: tl.constexpr,
    CHUNKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST: tl.constexpr,
    FULL: tl.constexpr,
):
    """Products `[BLOCK_M, BLOCK_N]` of the heads that are kept with those that are walked."""
    if CHUNKED:
        dot = dot_in_chunks(
            p_a, p_b, stride_ad, stride_bd, m_a, m_b, HEAD, BLOCK_M, BLOCK_N, BLOCK_D
        )
    else:
        dot = tl.dot(a, load_part(p_b, stride_bd, m_b, HEAD, 0, BLOCK_D, FULL).T)
        if REST:
            b_rest = load_part(p_b, stride_bd, m_b, HEAD, BLOCK_D, REST, FULL)
            dot = tl.dot(a_rest, b_rest.T, dot)
    return dot


@triton.jit
def _masked(
    logits,  # [queries, keys], or the other way round
    o_q,  # places of the queries, of the logits' rank
    o_k,
    S,
    bounds_ptr,
    valid_ptr,
    CAUSAL: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """Logits of one block, -inf where a query may not see a key."""
    m_q = o_q < S
    m_k = o_k < S
    allowed = m_q & m_k
    if CAUSAL:
        allowed = allowed & (o_k <= o_q)
    if HAS_BOUNDS:  # positions of one segment share its start
        start_q = tl.load(bounds_ptr + o_q, mask=m_q, other=-1)
        start_k = tl.load(bounds_ptr + o_k, mask=m_k, other=-1)
        allowed = allowed & (start_q == start_k)
    if HAS_VALID:
        valid_q = tl.load(valid_ptr + o_q, mask=m_q, other=0) != 0
        valid_k = tl.load(valid_ptr + o_k, mask=m_k, other=0) != 0
        allowed = allowed & valid_q & valid_k
    return tl.where(allowed, logits, float("-inf"))


@triton.jit
def row_lse_kernel(
    q_ptr,  # [B, H, S, Dh], any strides
    k_ptr,  # [B, Hk, S, Dh], any strides
    bounds_ptr,  # [2, S] int64: start and end of each position's segment, or unused
    valid_ptr,  # [B, S] uint8, or unused
    lse_ptr,  # [B, H, S] fp32, of base 2
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
    q = 0
    q_rest = 0
    if not CHUNKED:
        q = load_part(p_m, stride_qd, m_m, HEAD, 0, BLOCK_D, False)
        if REST:
            q_rest = load_part(p_m, stride_qd, m_m, HEAD, BLOCK_D, REST, False)
    last = tl.minimum(first + BLOCK_M, S)
    begin, full, end = _span(bounds_ptr, first, last, S, CAUSAL, HAS_BOUNDS, HAS_VALID, BLOCK_N)
    if CAUSAL:
        end = tl.minimum(end, last)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, full, BLOCK_N):
        dot = _dot(
            q, q_rest, p_m, p_n + start * stride_ks, stride_qd, stride_kd, m_m, steps < S,
            HEAD, CHUNKED, BLOCK_M, BLOCK_N, BLOCK_D, REST, True,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(dot, axis=1) * scale)
        shares = tl.exp2(dot * scale - new_peak[:, None])
        total = total * tl.exp2(peak - new_peak) + tl.sum(shares, axis=1)
        peak = new_peak
    for start in range(full, end, BLOCK_N):
        o_n = start + steps
        dot = _dot(
            q, q_rest, p_m, p_n + start * stride_ks, stride_qd, stride_kd, m_m, o_n < S,
            HEAD, CHUNKED, BLOCK_M, BLOCK_N, BLOCK_D, REST, False,
        )  # fmt: skip
        logits = _masked(
            dot * scale, o_m[:, None], o_n[None, :], S, bounds_ptr, p_valid,
            CAUSAL, HAS_BOUNDS, HAS_VALID,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        # -inf - -inf is nan: a row that has seen no key yet is shifted by 0
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shares = tl.exp2(logits - shift[:, None])
        total = total * tl.exp2(peak - shift) + tl.sum(shares, axis=1)
        peak = new_peak
    # a row without keys: exp2(logit - inf) is 0 in every column
    blind = total == 0.0
    lse = tl.where(blind, float("inf"), peak + tl.log2(tl.where(blind, 1.0, total)))
    tl.store(lse_ptr + i_bh * S + o_m, lse, mask=m_m)


@triton.jit
def column_mean_kernel(
    q_ptr,  # [B, H, S, Dh], any strides
    k_ptr,  # [B, Hk, S, Dh], any strides
    bounds_ptr,  # [2, S] int64, or unused
    valid_ptr,  # [B, S] uint8, or unused
    lse_ptr,  # [B, H, S] fp32, of base 2
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
    pid = tl.program_id(0)
    blocks = tl.cdiv(S, BLOCK_M)
    # int64 before any multiply
    first = (pid % blocks).to(tl.int64) * BLOCK_M
    i_bh = (pid // blocks).to(tl.int64)
    i_b = (pid // blocks // H).to(tl.int64)
    i_h = ((pid // blocks) % H).to(tl.int64)
    o_m = first + tl.arange(0, BLOCK_M)  # keys: their sums over queries are sums along a row
    m_m = o_m < S
    p_m = k_ptr + i_b * stride_kb + (i_h // GROUP) * stride_kh + o_m * stride_ks
    steps = tl.arange(0, BLOCK_N).to(tl.int64)
    p_n = q_ptr + i_b * stride_qb + i_h * stride_qh + steps * stride_qs
    p_lse = lse_ptr + i_bh * S + steps
    p_valid = valid_ptr
    if HAS_VALID:
        p_valid += i_b * S
    k = 0
    k_rest = 0
    if not CHUNKED:
        k = load_part(p_m, stride_kd, m_m, HEAD, 0, BLOCK_D, False)
        if REST:
            k_rest = load_part(p_m, stride_kd, m_m, HEAD, BLOCK_D, REST, False)
    last = tl.minimum(first + BLOCK_M, S)
    begin, full, end = _span(bounds_ptr, first, last, S, CAUSAL, HAS_BOUNDS, HAS_VALID, BLOCK_N)
    if CAUSAL:
        full = tl.maximum(begin, first)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if not CAUSAL:
        for start in range(begin, full, BLOCK_N):
            dot = _dot(
                k, k_rest, p_m, p_n + start * stride_qs, stride_kd, stride_qd, m_m, steps < S,
                HEAD, CHUNKED, BLOCK_M, BLOCK_N, BLOCK_D, REST, True,
            )  # fmt: skip
            lse = tl.load(p_lse + start)
            total += tl.sum(tl.exp2(dot * scale - lse[None, :]), axis=1)
    for start in range(full, end, BLOCK_N):
        o_n = start + steps
        dot = _dot(
            k, k_rest, p_m, p_n + start * stride_qs, stride_kd, stride_qd, m_m, o_n < S,
            HEAD, CHUNKED, BLOCK_M, BLOCK_N, BLOCK_D, REST, False,
        )  # fmt: skip
        logits = _masked(
            dot * scale, o_n[None, :], o_m[:, None], S, bounds_ptr, p_valid,
            CAUSAL, HAS_BOUNDS, HAS_VALID,
        )  # fmt: skip
        lse = tl.load(p_lse + start, mask=o_n < S, other=float("inf"))
        total += tl.sum(tl.exp2(logits - lse[None, :]), axis=1)
    if HAS_VALID:
        count = tl.load(count_ptr + i_b * stride_cb + o_m * stride_cs, mask=m_m, other=1)
        total = total / tl.maximum(count, 1).to(tl.float32)
    elif HAS_BOUNDS:
        start_m = tl.load(bounds_ptr + o_m, mask=m_m, other=0)
        end_m = tl.load(bounds_ptr + S + o_m, mask=m_m, other=1)
        total = total / (end_m - start_m).to(tl.float32)
    else:
        total = total / S
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
    rule |= {"num_warps": 8 if wide else 4, "num_stages": 3 if main + rest <= 128 else 2}
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
    lse = torch.empty_like(out)
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
    programs = B * H * ceil_div(S, rule["BLOCK_M"])
    strides = (*q.stride(), *k.stride())
    places = (0, 0) if counts is None else counts.stride()
    sizes = (scale * math.log2(math.e), H, S, H // k.shape[1])
    launch(row_lse_kernel, programs, q, k, bounds, valid, lse, *strides, *sizes, **options)
    launch(
        column_mean_kernel, programs, q, k, bounds, valid, lse, counts, out,
        *strides, *places, *sizes, **options,
    )  # fmt: skip
    return out
