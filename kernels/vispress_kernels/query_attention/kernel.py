"""`query_attention` in two Triton launches: masked logits with their splits' sums, then weights.

Memory-bound: reads each key once. Long key axes are split over programs, which is what fills the
device when there is one query; the splits' maxima and sums meet in the second launch, in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispress_kernels._heads import dot_in_chunks, head_rule, load_keys, load_queries
from vispress_kernels._launch import Rule, ceil_div, dot_operand, launch
from vispress_kernels.query_attention.reference import query_chunk

MAX_SPLITS = 128


@triton.jit
def logits_kernel(
    q_ptr,  # [B, Hk * GROUP, Q, Dh], any strides
    k_ptr,  # [B, Hk, N, Dh], any strides
    rows_ptr,  # [B, Q] int64, last key each query sees, or unused
    valid_ptr,  # [B, N] or [B, Q, N] uint8, or unused
    logits_ptr,  # [B, H, Q, N] fp32
    max_ptr,  # [B, H, Q, S] fp32
    sum_ptr,  # [B, H, Q, S] fp32
    stride_qb,
    stride_qh,
    stride_qq,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_rb,
    stride_vb,
    stride_vq,
    scale,
    Hk,
    Q,
    N,
    Dh,
    splits,
    tiles,  # blocks of keys a split has
    GROUP,  # query heads a key head
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
        q = load_queries(p_q, stride_qd, m_m, Dh, BLOCK_D)
    o_row = (i_b * Hk * GROUP + o_h) * Q + o_q  # [BLOCK_M], into [B, H, Q]
    if HAS_ROWS:
        last = tl.load(rows_ptr + i_b * stride_rb + o_q, mask=m_m, other=-1)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    p_k = k_ptr + i_b * stride_kb + i_h * stride_kh
    for i in range(tiles):
        o_n = (i_s * tiles + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        p_kn = p_k + o_n * stride_kn
        if CHUNKED:
            logits = dot_in_chunks(
                p_q, p_kn, stride_qd, stride_kd, m_m, m_n, Dh, BLOCK_M, BLOCK_N, BLOCK_D
            )
        else:
            logits = tl.dot(q, load_keys(p_kn, stride_kd, m_n, Dh, BLOCK_D))
        logits = logits * scale
        allowed = m_m[:, None] & m_n[None, :]
        p_logits = logits_ptr + o_row[:, None] * N + o_n[None, :]
        if PER_QUERY:
            p_valid = valid_ptr + i_b * stride_vb + o_q[:, None] * stride_vq + o_n[None, :]
            valid = tl.load(p_valid, mask=allowed, other=0)
            logits = tl.where(valid != 0, logits, float("-inf"))
        elif HAS_VALID:
            valid = tl.load(valid_ptr + i_b * stride_vb + o_n, mask=m_n, other=0)
            logits = tl.where((valid != 0)[None, :], logits, float("-inf"))
        if HAS_ROWS:
            logits = tl.where(o_n[None, :] <= last[:, None], logits, float("-inf"))
        tl.store(p_logits, logits, mask=allowed)
        logits = tl.where(allowed, logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        # -inf - -inf is nan: a row that has seen no key yet is shifted by 0
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        peak = new_peak
    tl.store(max_ptr + o_row * splits + i_s, peak, mask=m_m)
    tl.store(sum_ptr + o_row * splits + i_s, total, mask=m_m)


@triton.jit
def weights_kernel(
    logits_ptr,  # [B, H, Q, N] fp32
    max_ptr,  # [B, H, Q, S] fp32
    sum_ptr,  # [B, H, Q, S] fp32
    out_ptr,  # [B, H, Q, N] or [B, Q, N] fp32; may be `logits`
    stride_ob,
    stride_oq,
    H,
    Q,
    N,
    splits,
    MEAN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    o_n = (pid % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_row = pid // blocks_n
    o_s = tl.arange(0, BLOCK_S)
    m_n = o_n < N
    m_s = o_s < splits
    if MEAN:  # one program for all heads of (b, q)
        i_b = (i_row // Q).to(tl.int64)
        i_q = (i_row % Q).to(tl.int64)
        first = i_b * H * Q + i_q
        heads = H
        p_out = out_ptr + i_b * stride_ob + i_q * stride_oq
    else:
        first = i_row.to(tl.int64)
        heads = 1
        p_out = out_ptr + first * N
    mean = tl.zeros((BLOCK_N,), tl.float32)
    o_row = first
    for _h in range(heads):
        peaks = tl.load(max_ptr + o_row * splits + o_s, mask=m_s, other=float("-inf"))
        sums = tl.load(sum_ptr + o_row * splits + o_s, mask=m_s, other=0.0)
        peak = tl.max(peaks, axis=0)
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(sums * tl.exp(peaks - shift), axis=0)
        logits = tl.load(logits_ptr + o_row * N + o_n, mask=m_n, other=float("-inf"))
        # a query without keys has no distribution: 0, as in the reference
        mean += tl.exp(logits - shift) / tl.where(total == 0.0, 1.0, total)
        o_row += Q
    tl.store(p_out + o_n, mean / heads, mask=m_n)


def launch_rule(rows: int, Dh: int, itemsize: int) -> Rule:
    """Blocks for `rows` queries a key head and heads of Dh."""
    return {"BLOCK_M": 16 if rows <= 16 else 32, **head_rule(Dh, itemsize)}


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
    for begin in range(0, Q, size):
        part = slice(begin, min(begin + size, Q))
        target = out[:, part] if mean_heads else out
        _launch_chunk(
            q[:, :, part],
            k,
            None if rows is None else rows[:, part].contiguous(),
            valid if valid is None or valid.dim() == 2 else valid[:, part],
            scale,
            target,
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
    tiles = ceil_div(ceil_div(N, rule["BLOCK_N"]), MAX_SPLITS)
    splits = ceil_div(N, tiles * rule["BLOCK_N"])
    logits = torch.empty(B, H, Q, N, device=q.device) if mean_heads else out
    peaks, sums = torch.empty(2, B, H, Q, splits, device=q.device)
    launch(
        logits_kernel,
        B * Hk * ceil_div(group * Q, rule["BLOCK_M"]) * splits,
        q,
        k,
        rows,
        valid,
        logits,
        peaks,
        sums,
        *q.stride(),
        *k.stride(),
        Q,
        0 if valid is None else valid.stride(0),
        valid.stride(1) if valid is not None and valid.dim() == 3 else 0,
        scale,
        Hk,
        Q,
        N,
        Dh,
        splits,
        tiles,
        group,
        HAS_ROWS=rows is not None,
        HAS_VALID=valid is not None,
        PER_QUERY=valid is not None and valid.dim() == 3,
        **rule,
        on=q,
    )
    block_n = 128
    launch(
        weights_kernel,
        B * (Q if mean_heads else H * Q) * ceil_div(N, block_n),
        logits,
        peaks,
        sums,
        out,
        out.stride(0),
        out.stride(1),
        H,
        Q,
        N,
        splits,
        MEAN=mean_heads,
        BLOCK_S=MAX_SPLITS,
        BLOCK_N=block_n,
        num_warps=4,
        on=q,
    )
