"""`distinct_select` in Triton: one product of all tokens, and a program a list takes all rounds.

A round reads a quarter of the cosines of what is left, which are in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispress_kernels._launch import Rule, launch
from vispress_kernels._products import products_triton
from vispress_kernels.distinct_select.reference import least_cosine
from vispress_kernels.products import samples_together

LEAST = least_cosine(torch.float32)


@triton.jit(do_not_specialize=["B", "N", "K", "most"])
def distinct_kernel(
    cosine_ptr,  # [B, N, N] fp32
    left_ptr,  # [2, B, N] int32: the list, by turns
    distance_ptr,  # [B, N] fp32: of each even place to the nearest odd one
    out_ptr,  # [B, K] int64
    B,
    N,
    K,
    most,  # dropped a round
    LEAST: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_e, o_o = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_O)
    cosine_ptr += i_b * N * N
    distance_ptr += i_b * N
    now_ptr, next_ptr = left_ptr + i_b * N, left_ptr + (B.to(tl.int64) + i_b) * N
    for start in range(0, N, BLOCK_O):
        tl.store(now_ptr + start + o_o, start + o_o, mask=start + o_o < N)
    tl.debug_barrier()
    length = N
    while length > K:
        evens, odds = (length + 1) // 2, length // 2
        drop = tl.minimum(tl.minimum(most, length - K), evens)
        for start in range(0, evens, BLOCK_E):
            e = start + o_e
            row = tl.load(now_ptr + 2 * e, mask=e < evens, other=0).to(tl.int64)
            least = tl.full((BLOCK_E,), float("inf"), tl.float32)
            unknown = tl.zeros((BLOCK_E,), tl.int32)
            for begin in range(0, odds, BLOCK_O):
                o = begin + o_o
                column = tl.load(now_ptr + 2 * o + 1, mask=o < odds, other=0)
                pair = (e < evens)[:, None] & (o < odds)[None, :]
                apart = -tl.load(cosine_ptr + row[:, None] * N + column[None, :], mask=pair)
                apart = tl.where(pair, apart, float("inf"))
                known = apart == apart
                unknown = tl.maximum(unknown, tl.max(tl.where(known, 0, 1), axis=1))
                apart = tl.where(known & (apart >= LEAST), apart, LEAST)
                least = tl.minimum(least, tl.min(apart, axis=1))
            # a NaN is behind all numbers
            least = tl.where(unknown > 0, float("inf"), least)
            tl.store(distance_ptr + e, least, mask=e < evens)
        tl.debug_barrier()
        for start in range(0, evens, BLOCK_E):
            e = start + o_e
            own = tl.load(distance_ptr + e, mask=e < evens, other=0.0)
            rank = tl.zeros((BLOCK_E,), tl.int32)
            for begin in range(0, evens, BLOCK_O):
                o = begin + o_o
                other = tl.load(distance_ptr + o, mask=o < evens, other=float("inf"))
                before = other[None, :] < own[:, None]
                before = before | ((other[None, :] == own[:, None]) & (o[None, :] < e[:, None]))
                before = before & (o < evens)[None, :]
                rank += tl.sum(before.to(tl.int32), axis=1)
            token = tl.load(now_ptr + 2 * e, mask=e < evens, other=0)
            tl.store(next_ptr + rank - drop, token, mask=(e < evens) & (rank >= drop))
        for begin in range(0, odds, BLOCK_O):
            o = begin + o_o
            token = tl.load(now_ptr + 2 * o + 1, mask=o < odds, other=0)
            tl.store(next_ptr + evens - drop + o, token, mask=o < odds)
        tl.debug_barrier()
        length -= drop
        now_ptr, next_ptr = next_ptr, now_ptr
    for start in range(0, K, BLOCK_O):
        token = tl.load(now_ptr + start + o_o, mask=start + o_o < K, other=0).to(tl.int64)
        tl.store(out_ptr + i_b * K + start + o_o, token, mask=start + o_o < K)


def distinct_rule() -> Rule:
    """Tiles of places."""
    return {"BLOCK_E": 16, "BLOCK_O": 256, "num_warps": 16}


def distinct_select_triton(x: Tensor, num_keep: int, step: int) -> Tensor:
    """Launch the kernel, for as many lists at a time as may hold their cosines."""
    B, N, _ = x.shape
    out = torch.empty(B, num_keep, dtype=torch.int64, device=x.device)
    at_a_time = samples_together(x)
    for start in range(0, B, at_a_time):
        part = slice(start, start + at_a_time)
        own = x[part]
        b = len(own)
        left = torch.empty(2, b, N, dtype=torch.int32, device=x.device)
        distance = torch.empty(b, N, dtype=torch.float32, device=x.device)
        launch(
            distinct_kernel, b, products_triton(own), left, distance, out[part], b, N, num_keep,
            min(step, N), LEAST=LEAST, **distinct_rule(), on=x,
        )  # fmt: skip
    return out
