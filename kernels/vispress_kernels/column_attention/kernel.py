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

from vispress_kernels._heads import dot_heads, head_rule, load_part
from vispress_kernels._launch import Rule, ceil_div, dot_operand, launch, next_power_of_2
from vispress_kernels.column_attention.reference import query_counts

FEW_PROGRAMS = 264  # two for each multiprocessor of a large device


@triton.jit
def _reach(
    o_m,
    m_m,
    first,
    S,
    bounds_ptr,
    CAUSAL: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Whom rows meet: each `low` to `high`, their block `begin` to `end`, unmasked to `full`."""
    low = tl.zeros((BLOCK_M,), tl.int32)
    high = low + S
    begin = tl.zeros((), tl.int64)
    end = begin + S
    full = end // BLOCK_N * BLOCK_N
    if HAS_BOUNDS:
        low = tl.load(bounds_ptr + o_m, mask=m_m, other=0).to(tl.int32)
        high = tl.load(bounds_ptr + S + o_m, mask=m_m, other=1).to(tl.int32)
        last = tl.minimum(first + BLOCK_M, S) - 1
        begin = tl.load(bounds_ptr + first)
        end = tl.load(bounds_ptr + S + last)
        # the same segment from the first row to the last
        alone = begin == tl.load(bounds_ptr + last)
        full = tl.where(alone, begin + (end - begin) // BLOCK_N * BLOCK_N, begin)
    if CAUSAL or HAS_VALID:
        full = begin
    return low, high, begin, full, end


@triton.jit
def _masked(logits, low, high, start, p_valid, S, HAS_VALID: tl.constexpr, BLOCK_N: tl.constexpr):
    """Logits of one block, -inf outside `low` to `high` of each row and in invalid columns."""
    o_n = (start + tl.arange(0, BLOCK_N)).to(tl.int32)
    allowed = (o_n[None, :] >= low[:, None]) & (o_n[None, :] < high[:, None])
    if HAS_VALID:
        valid = tl.load(p_valid + o_n, mask=o_n < S, other=0) != 0
        allowed = allowed & valid[None, :]
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
    q, q_rest = 0, 0
    if not CHUNKED:
        q = load_part(p_m, stride_qd, m_m, HEAD, 0, BLOCK_D, False)
        if REST:
            q_rest = load_part(p_m, stride_qd, m_m, HEAD, BLOCK_D, REST, False)
    low, high, begin, full, end = _reach(
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
        new_peak = tl.maximum(peak, tl.max(dot, axis=1) * scale)
        total *= tl.exp2(peak - new_peak)
        total += tl.sum(tl.exp2(dot * scale - new_peak[:, None]), axis=1)
        peak = new_peak
    for start in range(full, end, BLOCK_N):
        dot = dot_heads(
            q, q_rest, p_m, p_n + start * stride_ks, stride_qd, stride_kd, m_m, start + steps < S,
            HEAD, CHUNKED, BLOCK_M, BLOCK_N, BLOCK_D, REST, False,
        )  # fmt: skip
        logits = _masked(dot * scale, low, high, start, p_valid, S, HAS_VALID, BLOCK_N)
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        # -inf - -inf is nan: a row that has seen no key yet is shifted by 0
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total *= tl.exp2(peak - shift)
        total += tl.sum(tl.exp2(logits - shift[:, None]), axis=1)
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
    k, k_rest = 0, 0
    if not CHUNKED:
        k = load_part(p_m, stride_kd, m_m, HEAD, 0, BLOCK_D, False)
        if REST:
            k_rest = load_part(p_m, stride_kd, m_m, HEAD, BLOCK_D, REST, False)
    low, high, begin, full, end = _reach(
        o_m, m_m, first, S, bounds_ptr, CAUSAL, HAS_BOUNDS, HAS_VALID, BLOCK_M, BLOCK_N
    )
    count = tl.maximum(high - low, 1)
    if CAUSAL:
        low = tl.maximum(low, o_m.to(tl.int32))
        full = tl.maximum(begin, first)
    if HAS_VALID:  # an invalid row meets nobody
        high = tl.where(tl.load(p_valid + o_m, mask=m_m, other=0) != 0, high, low)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if not CAUSAL:
        for start in range(begin, full, BLOCK_N):
            lse = tl.load(p_lse + start)  # ahead of the product, which hides it
            dot = dot_heads(
                k, k_rest, p_m, p_n + start * stride_qs, stride_kd, stride_qd, m_m, steps < S,
                HEAD, CHUNKED, BLOCK_M, BLOCK_N, BLOCK_D, REST, True,
            )  # fmt: skip
            total += tl.sum(tl.exp2(dot * scale - lse[None, :]), axis=1)
    for start in range(full, end, BLOCK_N):
        lse = tl.load(p_lse + start, mask=start + steps < S, other=float("inf"))
        dot = dot_heads(
            k, k_rest, p_m, p_n + start * stride_qs, stride_kd, stride_qd, m_m, start + steps < S,
            HEAD, CHUNKED, BLOCK_M, BLOCK_N, BLOCK_D, REST, False,
        )  # fmt: skip
        logits = _masked(dot * scale, low, high, start, p_valid, S, HAS_VALID, BLOCK_N)
        total += tl.sum(tl.exp2(logits - lse[None, :]), axis=1)
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
    count_strides = (0, 0) if counts is None else counts.stride()
    sizes = (scale * math.log2(math.e), H, S, H // k.shape[1])
    launch(row_lse_kernel, programs, q, k, bounds, valid, lse, *strides, *sizes, **options)
    launch(
        column_mean_kernel, programs, q, k, bounds, valid, lse, counts, out,
        *strides, *count_strides, *sizes, **options,
    )  # fmt: skip
    return out
