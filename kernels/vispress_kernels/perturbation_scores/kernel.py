"""`perturbation_scores` in Triton: changes of some directions at a time, then their product's norm.

Bound by the tensor cores. One launch writes `act(h + move) - act(h - move)` of a few directions in
W2's dtype, no more than a few times the size of `W1 x`; the next multiplies them by W2 and keeps a
sum of squares for each row and block of outputs, so that `[m, N, D]` exists nowhere. Changes are
divided by a power of two of their direction's, which fp16 needs and nothing else notices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispress_kernels._launch import Rule, ceil_div, dot_operand, launch, store_dtype
from vispress_kernels._tiles import in_groups, product_of_tiles
from vispress_kernels.perturbation_scores.reference import HALVES, Activation, scales

ROWS = 16384  # of one product, where there are directions enough: many waves of programs


@triton.jit
def _activate(x, TANH: tl.constexpr):
    if TANH:
        # x * sigmoid(2 z) is x / 2 * (1 + tanh(z))
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-inner))
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["first", "count", "N"])
def activation_change_kernel(
    hidden_ptr,  # [N, Dh] fp32, all samples' tokens
    move_ptr,  # [m, Dh] fp32
    scale_ptr,  # [m] fp32
    out_ptr,  # [count, N, Dh] of W2's dtype
    first,  # direction
    count,  # of directions
    N,
    Dh,
    TANH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(Dh, BLOCK_K)
    # int64 before any multiply
    o_n = ((pid // blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_k = ((pid % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    m_k = o_k < Dh
    mask = (o_n < N)[:, None] & m_k[None, :]
    o_nk = o_n[:, None] * Dh + o_k[None, :]
    hidden = tl.load(hidden_ptr + o_nk, mask=mask, other=0.0)
    i_j = tl.zeros((), tl.int64) + first
    p_out = out_ptr + o_nk
    step = (tl.zeros((), tl.int64) + N) * Dh
    for _ in range(count):
        move = tl.load(move_ptr + i_j * Dh + o_k, mask=m_k, other=0.0)[None, :]
        change = _activate(hidden + move, TANH) - _activate(hidden - move, TANH)
        change = change * (1.0 / tl.load(scale_ptr + i_j))  # a power of two: nothing is lost
        tl.store(p_out, change.to(out_ptr.dtype.element_ty), mask=mask)
        i_j += 1
        p_out += step


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["squares_ptr"])
def perturbation_scores_kernel(
    change_ptr,  # [R, Dh] of W2's dtype
    w2_ptr,  # [D, Dh], any strides
    squares_ptr,  # [R, blocks of D] fp32
    stride_wd,
    stride_wk,
    R,
    Dh,
    D,
    EVEN: tl.constexpr,  # BLOCK_K divides Dh
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks_n, blocks_d = tl.cdiv(R, BLOCK_N), tl.cdiv(D, BLOCK_D)
    i_n, i_d = in_groups(pid, blocks_n, blocks_d, GROUP)
    # int64 before any multiply
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    i_d = i_d.to(tl.int64)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_k = tl.arange(0, BLOCK_K).to(tl.int64)
    # rows past the end read the last one and are not stored; outputs past it are left out below
    p_a = change_ptr + tl.minimum(o_n, R - 1)[:, None] * Dh + o_k[None, :]
    p_w = w2_ptr + tl.minimum(o_d, D - 1)[None, :] * stride_wd + o_k[:, None] * stride_wk
    step = (tl.zeros((), tl.int64) + BLOCK_K) * stride_wk
    product = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    product = product_of_tiles(p_a, p_w, BLOCK_K, step, o_k, Dh, product, EVEN, BLOCK_K)
    product = tl.where((o_d < D)[None, :], product, 0.0)
    squares = tl.sum(product * product, axis=1)
    tl.store(squares_ptr + o_n * blocks_d + i_d, squares, mask=o_n < R)


def change_rule() -> Rule:
    """Blocks of the changes: a row of a program is contiguous."""
    return {"BLOCK_N": 4, "BLOCK_K": 256, "num_warps": 4}


def launch_rule(itemsize: int) -> Rule:
    """Blocks of the product by W2's element size: the stages fit 99 KiB of shared memory."""
    if itemsize == 4:
        tile = {"BLOCK_N": 64, "BLOCK_D": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    else:
        tile = {"BLOCK_N": 128, "BLOCK_D": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    return {"GROUP": 16, **tile}


def perturbation_scores_triton(
    hidden: Tensor, moves: Tensor, w2: Tensor, activation: Activation
) -> Tensor:
    """Launch the kernels; arguments as in `perturbation_scores_reference`."""
    tokens, moves = hidden.flatten(0, -2).contiguous(), moves.contiguous()
    (N, Dh), m, D = tokens.shape, len(moves), len(w2)
    dtype = w2.dtype if w2.dtype in HALVES else torch.float32
    rule, blocks = launch_rule(dtype.itemsize), change_rule()
    weight, scale = dot_operand(w2), scales(moves)
    blocks_d = ceil_div(D, rule["BLOCK_D"])
    count = ceil_div(m, ceil_div(m, max(1, ROWS // max(1, N))))  # directions at a time
    change = torch.empty(count, N, Dh, dtype=store_dtype(dtype), device=hidden.device)
    squares = torch.empty(m, N, blocks_d, dtype=torch.float32, device=hidden.device)
    for first in range(0, m, count):
        here = min(count, m - first)
        launch(
            activation_change_kernel,
            ceil_div(N, blocks["BLOCK_N"]) * ceil_div(Dh, blocks["BLOCK_K"]),
            tokens,
            moves,
            scale,
            change,
            first,
            here,
            N,
            Dh,
            TANH=activation == "gelu_tanh",
            **blocks,
            on=hidden,
        )
        launch(
            perturbation_scores_kernel,
            ceil_div(here * N, rule["BLOCK_N"]) * blocks_d,
            dot_operand(change.to(dtype)),  # itself, but under the interpreter
            weight,
            squares[first:],
            *weight.stride(),
            here * N,
            Dh,
            D,
            EVEN=Dh % rule["BLOCK_K"] == 0,
            **rule,
            on=hidden,
        )
    norms = squares.sum(-1).sqrt_().mul_(scale[:, None])
    return norms.mean(0).view(hidden.shape[:-1])
