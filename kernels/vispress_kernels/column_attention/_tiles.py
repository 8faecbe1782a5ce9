"""Blocks of q k^T in `column_attention`'s two launches. Imported by them only: imports triton."""

import triton
import triton.language as tl

from vispress_kernels._heads import dot_heads, dot_in_chunks


@triton.jit
def reach(
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
def allowed_places(low, high, start, p_valid, S, HAS_VALID: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which columns of one block each row meets: from `low` to `high`, and valid."""
    o_n = (start + tl.arange(0, BLOCK_N)).to(tl.int32)
    allowed = (o_n[None, :] >= low[:, None]) & (o_n[None, :] < high[:, None])
    if HAS_VALID:
        valid = tl.load(p_valid + o_n, mask=o_n < S, other=0) != 0
        allowed = allowed & valid[None, :]
    return allowed


@triton.jit
def at_most_0(exponent):
    """The exponent, or 0; nan stays."""
    return tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rescaled(peak, new_peak, scale):
    """Factor of a sum whose peak moves; 1 for the empty sum, whose peak is -inf."""
    # -inf times a scale of 0 is nan
    return tl.exp2(tl.where(peak == float("-inf"), 0.0, peak - new_peak) * scale)


@triton.jit
def column_products(
    k,
    k_rest,
    p_k,
    p_q,
    stride_kd,
    stride_qd,
    m_k,
    m_q,
    HEAD: tl.constexpr,
    CHUNKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST: tl.constexpr,
    FULL: tl.constexpr,
):
    """Products of keys (rows) with queries (columns), the same numbers as in `row_stats_kernel`.

    Of fp32 they round by the order of operands, which is kept, as is the shape of a block.
    """
    if CHUNKED:
        dot = dot_in_chunks(
            p_q, p_k, stride_qd, stride_kd, m_q, m_k, HEAD, BLOCK_N, BLOCK_M, BLOCK_D
        ).T
    else:
        dot = dot_heads(
            k, k_rest, p_k, p_q, stride_kd, stride_qd, m_k, m_q,
            HEAD, CHUNKED, BLOCK_M, BLOCK_N, BLOCK_D, REST, FULL,
        )  # fmt: skip
    return dot
