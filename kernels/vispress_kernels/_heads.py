"""The q k^T block shared by the attention kernels. Imported by them only: this imports triton."""

import triton
import triton.language as tl

from vispress_kernels._launch import Rule, next_power_of_2


@triton.jit
def load_queries(p_q, stride_d, m_m, Dh, BLOCK_D: tl.constexpr):
    """Whole query heads `[BLOCK_M, BLOCK_D]` from their row pointers."""
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = m_m[:, None] & (o_d < Dh)[None, :]
    return tl.load(p_q[:, None] + o_d[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit
def load_keys(p_k, stride_d, m_n, Dh, BLOCK_D: tl.constexpr):
    """Whole key heads, transposed, `[BLOCK_D, BLOCK_N]`."""
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = (o_d < Dh)[:, None] & m_n[None, :]
    return tl.load(p_k[None, :] + o_d[:, None] * stride_d, mask=mask, other=0.0)


@triton.jit
def load_part(
    p_rows,
    stride_d,
    m_rows,
    HEAD: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FULL: tl.constexpr,  # all rows are there
):
    """Elements FIRST to FIRST + BLOCK_D of each head of HEAD, `[rows, BLOCK_D]`."""
    o_d = FIRST + tl.arange(0, BLOCK_D).to(tl.int64)
    p = p_rows[:, None] + o_d[None, :] * stride_d
    if FULL and FIRST + BLOCK_D <= HEAD:
        part = tl.load(p)
    elif FULL:
        part = tl.load(p, mask=(o_d < HEAD)[None, :], other=0.0)
    elif FIRST + BLOCK_D <= HEAD:
        part = tl.load(p, mask=m_rows[:, None], other=0.0)
    else:
        part = tl.load(p, mask=m_rows[:, None] & (o_d < HEAD)[None, :], other=0.0)
    return part


@triton.jit
def dot_in_chunks(
    p_q,
    p_k,
    stride_qd,
    stride_kd,
    m_m,
    m_n,
    Dh,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`[BLOCK_M, BLOCK_N]` products of heads too large for registers, BLOCK_D elements a time."""
    dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    o_start = tl.zeros((), tl.int64)
    for start in range(0, Dh, BLOCK_D):
        q = load_queries(p_q + o_start * stride_qd, stride_qd, m_m, Dh - start, BLOCK_D)
        k = load_keys(p_k + o_start * stride_kd, stride_kd, m_n, Dh - start, BLOCK_D)
        dot = tl.dot(q, k, dot, input_precision="tf32x3")
        o_start += BLOCK_D
    return dot


@triton.jit
def dot_heads(
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
    """`[BLOCK_M, BLOCK_N]` products of heads already loaded, in one or two parts, with others."""
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


def head_rule(Dh: int, itemsize: int) -> Rule:
    """Blocks for heads of Dh: whole where they fit, fp32 in chunks (it would spill)."""
    if itemsize == 4:
        return {"BLOCK_N": 32, "BLOCK_D": 16, "CHUNKED": True, "num_warps": 4, "num_stages": 1}
    return {
        "BLOCK_N": 64 if Dh <= 128 else 32,
        "BLOCK_D": max(64, next_power_of_2(Dh)),
        "CHUNKED": False,
        "num_warps": 4 if Dh <= 128 else 8,
        "num_stages": 2,
    }
