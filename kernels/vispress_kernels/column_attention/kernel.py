"""`column_attention` in two Triton launches: each row's log-sum-exp, then each column's mean.

Bound by the tensor cores: q k^T is computed twice and stored never. The column pass walks the
queries of one block of keys in order, so nothing is added atomically.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispress_kernels._heads import dot_in_chunks, head_rule, load_keys, load_queries
from vispress_kernels._launch import Rule, ceil_div, dot_operand, launch
from vispress_kernels.column_attention.reference import query_counts


@triton.jit
def _scores(
    dot,  # [BLOCK_M, BLOCK_N]
    o_m,
    o_n,
    scale,
    S,
    start_ptr,
    valid_ptr,
    CAUSAL: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """Logits of one block, -inf where a query may not see a key."""
    m_m = o_m < S
    m_n = o_n < S
    allowed = m_m[:, None] & m_n[None, :]
    if CAUSAL:
        allowed = allowed & (o_n[None, :] <= o_m[:, None])
    if HAS_BOUNDS:  # positions of one segment share its start
        start_m = tl.load(start_ptr + o_m, mask=m_m, other=-1)
        start_n = tl.load(start_ptr + o_n, mask=m_n, other=-1)
        allowed = allowed & (start_m[:, None] == start_n[None, :])
    if HAS_VALID:
        valid_m = tl.load(valid_ptr + o_m, mask=m_m, other=0) != 0
        valid_n = tl.load(valid_ptr + o_n, mask=m_n, other=0) != 0
        allowed = allowed & valid_m[:, None] & valid_n[None, :]
    return tl.where(allowed, dot * scale, float("-inf"))


@triton.jit
def row_lse_kernel(
    q_ptr,  # [B, H, S, Dh], any strides
    k_ptr,  # [B, Hk, S, Dh], any strides
    bounds_ptr,  # [2, S] int64: start and end of each position's segment, or unused
    valid_ptr,  # [B, S] uint8, or unused
    lse_ptr,  # [B, H, S] fp32
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    scale,
    H,
    S,
    Dh,
    GROUP,  # query heads a key head
    CAUSAL: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    CHUNKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(S, BLOCK_M)
    # int64 before any multiply
    i_m = (pid % blocks).to(tl.int64)
    i_bh = (pid // blocks).to(tl.int64)
    i_b = (pid // blocks // H).to(tl.int64)
    i_h = ((pid // blocks) % H).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < S
    p_q = q_ptr + i_b * stride_qb + i_h * stride_qh
    p_k = k_ptr + i_b * stride_kb + (i_h // GROUP) * stride_kh
    p_qm = p_q + o_m * stride_qs
    if not CHUNKED:
        q = load_queries(p_qm, stride_qd, m_m, Dh, BLOCK_D)
    begin = tl.zeros((), tl.int64)
    end = begin + S
    last = tl.minimum((i_m + 1) * BLOCK_M, S)
    if HAS_BOUNDS:
        begin = tl.load(bounds_ptr + i_m * BLOCK_M)
        end = tl.load(bounds_ptr + S + last - 1)
    if CAUSAL:
        end = tl.minimum(end, last)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        o_n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        m_n = o_n < S
        p_kn = p_k + o_n * stride_ks
        if CHUNKED:
            dot = dot_in_chunks(
                p_qm, p_kn, stride_qd, stride_kd, m_m, m_n, Dh, BLOCK_M, BLOCK_N, BLOCK_D
            )
        else:
            dot = tl.dot(q, load_keys(p_kn, stride_kd, m_n, Dh, BLOCK_D))
        logits = _scores(
            dot, o_m, o_n, scale, S, bounds_ptr, valid_ptr + i_b * S if HAS_VALID else valid_ptr,
            CAUSAL, HAS_BOUNDS, HAS_VALID,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        peak = new_peak
    # a row without keys: exp(logit - inf) is 0 in every column
    seen = total > 0.0
    lse = tl.where(seen, peak + tl.log(tl.where(seen, total, 1.0)), float("inf"))
    tl.store(lse_ptr + i_bh * S + o_m, lse, mask=o_m < S)


@triton.jit
def column_mean_kernel(
    q_ptr,  # [B, H, S, Dh], any strides
    k_ptr,  # [B, Hk, S, Dh], any strides
    bounds_ptr,  # [2, S] int64, or unused
    valid_ptr,  # [B, S] uint8, or unused
    lse_ptr,  # [B, H, S] fp32
    count_ptr,  # [B, S] int64: queries averaged over
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
    scale,
    H,
    S,
    Dh,
    GROUP,  # query heads a key head
    CAUSAL: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    CHUNKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(S, BLOCK_N)
    # int64 before any multiply
    i_n = (pid % blocks).to(tl.int64)
    i_bh = (pid // blocks).to(tl.int64)
    i_b = (pid // blocks // H).to(tl.int64)
    i_h = ((pid // blocks) % H).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < S
    p_q = q_ptr + i_b * stride_qb + i_h * stride_qh
    p_k = k_ptr + i_b * stride_kb + (i_h // GROUP) * stride_kh
    p_kn = p_k + o_n * stride_ks
    if not CHUNKED:
        k = load_keys(p_kn, stride_kd, m_n, Dh, BLOCK_D)
    begin = tl.zeros((), tl.int64)
    end = begin + S
    if HAS_BOUNDS:
        begin = tl.load(bounds_ptr + i_n * BLOCK_N)
        end = tl.load(bounds_ptr + S + tl.minimum((i_n + 1) * BLOCK_N, S) - 1)
    if CAUSAL:
        begin = tl.maximum(begin, i_n * BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(begin, end, BLOCK_M):
        o_m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        m_m = o_m < S
        p_qm = p_q + o_m * stride_qs
        if CHUNKED:
            dot = dot_in_chunks(
                p_qm, p_kn, stride_qd, stride_kd, m_m, m_n, Dh, BLOCK_M, BLOCK_N, BLOCK_D
            )
        else:
            dot = tl.dot(load_queries(p_qm, stride_qd, m_m, Dh, BLOCK_D), k)
        logits = _scores(
            dot, o_m, o_n, scale, S, bounds_ptr, valid_ptr + i_b * S if HAS_VALID else valid_ptr,
            CAUSAL, HAS_BOUNDS, HAS_VALID,
        )  # fmt: skip
        lse = tl.load(lse_ptr + i_bh * S + o_m, mask=o_m < S, other=float("inf"))
        total += tl.sum(tl.exp(logits - lse[:, None]), axis=0)
    count = tl.load(count_ptr + i_b * stride_cb + o_n * stride_cs, mask=o_n < S, other=1)
    mean = total / tl.maximum(count, 1).to(tl.float32)
    tl.store(out_ptr + i_bh * S + o_n, mean, mask=o_n < S)


def launch_rule(Dh: int, itemsize: int) -> Rule:
    """Blocks for heads of Dh, walked by both passes; square but in fp32, which would spill."""
    rule = head_rule(Dh, itemsize)
    return {"BLOCK_M": 16 if rule["CHUNKED"] else rule["BLOCK_N"], **rule}


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
    counts = query_counts(bounds, valid, q)
    valid = None if valid is None else valid.contiguous().view(torch.uint8)
    rule = launch_rule(Dh, q.element_size())
    q, k = dot_operand(q), dot_operand(k)
    options: dict[str, Any] = {
        "CAUSAL": causal,
        "HAS_BOUNDS": bounds is not None,
        "HAS_VALID": valid is not None,
        **rule,
        "on": q,
    }
    row_programs, column_programs = (B * H * ceil_div(S, rule[b]) for b in ("BLOCK_M", "BLOCK_N"))
    strides = (*q.stride(), *k.stride())
    sizes = (scale, H, S, Dh, H // k.shape[1])
    launch(row_lse_kernel, row_programs, q, k, bounds, valid, lse, *strides, *sizes, **options)
    launch(
        column_mean_kernel, column_programs, q, k, bounds, valid, lse, counts, out,
        *strides, *counts.stride(), *sizes, **options,
    )  # fmt: skip
    return out
