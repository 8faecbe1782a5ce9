"""`query_attention` in two Triton launches: masked logits with their splits' sums, then weights.

Memory-bound: reads each key once. Long key axes are split over programs, which is what fills the
device when there is one query; the splits' maxima and sums meet in the second launch, in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispress_kernels._heads import dot_in_chunks, head_rule, load_part
from vispress_kernels._launch import Rule, ceil_div, dot_operand, launch, next_power_of_2
from vispress_kernels.query_attention.reference import query_chunk

MAX_SPLITS = 128
PROGRAMS = 256  # about what a large device runs at once, a sample
MAX_ROWS = 32  # heads of one query that are added up at a time


@triton.jit(do_not_specialize=["stride_vb", "stride_vq", "splits", "tiles"])
def logits_kernel(
    q_ptr,  # [B, Hk * GROUP, Q, HEAD], any strides
    k_ptr,  # [B, Hk, N, HEAD], any strides
    rows_ptr,  # [B, Q] int64, last key each query sees, or unused
    valid_ptr,  # [B, N] or [B, Q, N] uint8, or unused
    logits_ptr,  # [B, H, Q, N] fp32
    stats_ptr,  # [B, H, Q, 2, splits] fp32: maxima, then sums
    stride_qb,
    stride_qh,
    stride_qq,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_rb,
    stride_rq,
    stride_vb,
    stride_vq,
    scale,
    Hk,
    Q,
    N,
    splits,
    tiles,  # blocks of keys a split has
    GROUP,  # query heads a key head
    HEAD: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    PER_QUERY: tl.constexpr,  # a mask row for each query
    CHUNKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(GROUP * Q, BLOCK_M)
    # int64 before any multiply
    i_s = (pid % splits).to(tl.int64)
    i_m = (pid // splits) % blocks_m
    i_h = ((pid // splits // blocks_m) % Hk).to(tl.int64)
    i_b = (pid // splits // blocks_m // Hk).to(tl.int64)
    # the queries of one key head, over the heads that share it
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < GROUP * Q
    o_h = i_h * GROUP + o_m // Q
    o_q = (o_m % Q).to(tl.int64)
    p_q = q_ptr + i_b * stride_qb + o_h * stride_qh + o_q * stride_qq
    if not CHUNKED:
        q = load_part(p_q, stride_qd, m_m, HEAD, 0, BLOCK_D, False)
    o_row = (i_b * Hk * GROUP + o_h) * Q + o_q  # [BLOCK_M], into [B, H, Q]
    if HAS_ROWS:
        last = tl.load(rows_ptr + i_b * stride_rb + o_q * stride_rq, mask=m_m, other=-1)
    # a maximum and a sum in every place of the block: reduced once, behind the loop
    peak = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    p_k = k_ptr + i_b * stride_kb + i_h * stride_kh
    for i in range(tiles):
        o_n = (i_s * tiles + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        p_kn = p_k + o_n * stride_kn
        if CHUNKED:
            logits = dot_in_chunks(
                p_q, p_kn, stride_qd, stride_kd, m_m, m_n, HEAD, BLOCK_M, BLOCK_N, BLOCK_D
            )
        else:
            logits = tl.dot(q, load_part(p_kn, stride_kd, m_n, HEAD, 0, BLOCK_D, False).T)
        allowed = m_m[:, None] & m_n[None, :]
        seen = allowed
        if PER_QUERY:
            p_valid = valid_ptr + i_b * stride_vb + o_q[:, None] * stride_vq + o_n[None, :]
            seen = tl.load(p_valid, mask=allowed, other=0) != 0
        elif HAS_VALID:
            valid = tl.load(valid_ptr + i_b * stride_vb + o_n, mask=m_n, other=0)
            seen = seen & (valid != 0)[None, :]
        if HAS_ROWS:
            seen = seen & (o_n[None, :] <= last[:, None])
        logits = tl.where(seen, logits * scale, float("-inf"))
        tl.store(logits_ptr + o_row[:, None] * N + o_n[None, :], logits, mask=allowed)
        new_peak = tl.maximum(peak, logits)
        # -inf - -inf is nan: a place that has seen no key yet is shifted by 0
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp(peak - shift) + tl.exp(logits - shift)
        peak = new_peak
    top = tl.max(peak, axis=1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(total * tl.exp(peak - shift[:, None]), axis=1)
    p_stats = stats_ptr + o_row * 2 * splits + i_s
    tl.store(p_stats, top, mask=m_m)
    tl.store(p_stats + splits, total, mask=m_m)


@triton.jit(do_not_specialize=["splits"])
def weights_kernel(
    logits_ptr,  # [B, H, Q, N] fp32
    stats_ptr,  # [B, H, Q, 2, splits] fp32: maxima, then sums
    out_ptr,  # [B, H, Q, N] or [B, Q, N] fp32; may be `logits`
    stride_ob,
    H,
    Q,
    N,
    splits,
    MEAN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    o_n = (pid % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    i_row = pid // blocks_n
    if MEAN:  # one program for all heads of (b, q)
        i_b = (i_row // Q).to(tl.int64)
        i_q = (i_row % Q).to(tl.int64)
        first = i_b * H * Q + i_q
        heads = H
        p_out = out_ptr + i_b * stride_ob + i_q * N
    else:
        first = i_row.to(tl.int64)
        heads = 1
        p_out = out_ptr + first * N
    o_h = tl.arange(0, BLOCK_H)
    o_s = tl.arange(0, BLOCK_S)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    for begin in range(0, heads, BLOCK_H):
        m_h = begin + o_h < heads
        o_row = first + (begin + o_h).to(tl.int64) * Q
        p_logits = logits_ptr + o_row[:, None] * N + o_n[None, :]
        logits = tl.load(p_logits, mask=m_h[:, None] & m_n[None, :], other=float("-inf"))
        m_s = m_h[:, None] & (o_s < splits)[None, :]
        p_stats = stats_ptr + o_row[:, None] * 2 * splits + o_s[None, :]
        peaks = tl.load(p_stats, mask=m_s, other=float("-inf"))
        sums = tl.load(p_stats + splits, mask=m_s, other=0.0)
        peak = tl.max(peaks, axis=1)
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(sums * tl.exp(peaks - shift[:, None]), axis=1)
        # a query without keys has no distribution: 0, as in the reference
        share = 1.0 / (tl.where(total == 0.0, 1.0, total) * heads)
        mean += tl.sum(tl.exp(logits - shift[:, None]) * share[:, None], axis=0)
    tl.store(p_out + o_n, mean, mask=m_n)


def launch_rule(rows: int, Dh: int, itemsize: int) -> Rule:
    """Blocks for `rows` queries a key head and heads of Dh."""
    rule = head_rule(Dh, itemsize)
    if not rule["CHUNKED"]:
        rule["num_stages"] = 3 if Dh <= 128 else 2
    return {"BLOCK_M": 16 if rows <= 16 else 32, **rule}


def split_rule(N: int, row_blocks: int, block_n: int) -> tuple[int, int]:
    """Splits of the keys, and blocks of keys in each, where a sample has `row_blocks`."""
    most = min(MAX_SPLITS, max(1, PROGRAMS // row_blocks))
    tiles = ceil_div(ceil_div(N, block_n), most)
    return ceil_div(N, tiles * block_n), tiles


def weights_rule(H: int, N: int, splits: int, mean_heads: bool) -> Rule:
    """Blocks of the second launch: all heads at once for a mean, one row otherwise."""
    rule = {"BLOCK_H": 1, "BLOCK_S": next_power_of_2(splits), "BLOCK_N": 512, "num_warps": 4}
    if mean_heads:
        rule["BLOCK_H"] = min(MAX_ROWS, next_power_of_2(H))
        # every program reads the splits of all heads: fewer programs where keys are many
        rule["BLOCK_N"] = 64 if N <= 4096 else 256 if N > 65_536 and splits > 32 else 128
        rule["num_warps"] = 8 if N > 4096 else 4
    return rule


def query_attention_triton(
    q: Tensor,
    k: Tensor,
    rows: Tensor | None,
    valid: Tensor | None,
    scale: float,
    mean_heads: bool,
) -> Tensor:
    """Launch the kernels; arguments as in `query_attention_reference`."""
    B, H, Q, _Dh = q.shape
    _Hk, N = k.shape[1:3]
    shape = (B, Q, N) if mean_heads else (B, H, Q, N)
    out = torch.empty(shape, dtype=torch.float32, device=q.device)
    if not out.numel() or not H:
        return out.zero_()
    if valid is not None:
        valid = (valid if valid.stride(-1) == 1 else valid.contiguous()).view(torch.uint8)
    # with the heads averaged the logits are scratch: keep it as small as the keys
    size = query_chunk(q, k) if mean_heads else Q
    q, k = dot_operand(q), dot_operand(k)
    if size >= Q:
        _launch_chunk(q, k, rows, valid, scale, out, mean_heads)
        return out
    for begin in range(0, Q, size):
        part = slice(begin, min(begin + size, Q))
        _launch_chunk(
            q[:, :, part],
            k,
            None if rows is None else rows[:, part],
            valid if valid is None or valid.dim() == 2 else valid[:, part],
            scale,
            out[:, part],
            mean_heads,
        )
    return out


def _launch_chunk(
    q: Tensor,
    k: Tensor,
    rows: Tensor | None,
    valid: Tensor | None,
    scale: float,
    out: Tensor,
    mean_heads: bool,
) -> None:
    B, H, Q, Dh = q.shape
    Hk, N = k.shape[1:3]
    group = H // Hk
    rule = launch_rule(group * Q, Dh, q.element_size())
    row_blocks = Hk * ceil_div(group * Q, rule["BLOCK_M"])
    splits, tiles = split_rule(N, row_blocks, rule["BLOCK_N"])
    logits = torch.empty(B, H, Q, N, device=q.device) if mean_heads else out
    stats = torch.empty(B, H, Q, 2, splits, device=q.device)
    per_query = valid is not None and valid.dim() == 3
    launch(
        logits_kernel,
        B * row_blocks * splits,
        q,
        k,
        rows,
        valid,
        logits,
        stats,
        *q.stride(),
        *k.stride(),
        *((0, 0) if rows is None else rows.stride()),
        0 if valid is None else valid.stride(0),
        valid.stride(1) if valid is not None and per_query else 0,
        scale,
        Hk,
        Q,
        N,
        splits,
        tiles,
        group,
        HEAD=Dh,
        HAS_ROWS=rows is not None,
        HAS_VALID=valid is not None,
        PER_QUERY=per_query,
        **rule,
        on=q,
    )
    rule = weights_rule(H, N, splits, mean_heads)
    launch(
        weights_kernel,
        B * (Q if mean_heads else H * Q) * ceil_div(N, rule["BLOCK_N"]),
        logits,
        stats,
        out,
        out.stride(0),
        H,
        Q,
        N,
        splits,
        MEAN=mean_heads,
        **rule,
        on=q,
    )
