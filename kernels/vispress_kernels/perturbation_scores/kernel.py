"""`perturbation_scores` in Triton: activation, second product, difference and norm in one program.

Bound by the tensor cores. A program has one direction and a block of tokens and keeps only their
squared norms, so `[m, N, D]` exists nowhere. The activations are formed again for each block of
outputs, which is free when W2 is given at low rank and costs up to D / 64 times otherwise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vispress_kernels._launch import Rule, ceil_div, launch
from vispress_kernels.perturbation_scores.reference import Activation


@triton.jit
def _activate(x, TANH: tl.constexpr):
    if TANH:
        # x * sigmoid(2 z) is x / 2 * (1 + tanh(z))
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-inner))
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def perturbation_scores_kernel(
    hidden_ptr,  # [N, Dh] fp32, all samples' tokens
    move_ptr,  # [m, Dh] fp32
    w2_ptr,  # [D, Dh], any strides
    norm_ptr,  # [m, N] fp32
    stride_wd,
    stride_wk,
    N,
    Dh,
    D,
    TANH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    # int64 before any multiply
    i_j = (pid // blocks).to(tl.int64)
    o_n = ((pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_n = o_n < N
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start_d in range(0, D, BLOCK_D):
        o_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        m_d = o_d < D
        change = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for start_k in range(0, Dh, BLOCK_K):
            o_k = (start_k + tl.arange(0, BLOCK_K)).to(tl.int64)
            m_k = o_k < Dh
            hidden = tl.load(
                hidden_ptr + o_n[:, None] * Dh + o_k[None, :],
                mask=m_n[:, None] & m_k[None, :],
                other=0.0,
            )
            move = tl.load(move_ptr + i_j * Dh + o_k, mask=m_k, other=0.0)[None, :]
            act = _activate(hidden + move, TANH) - _activate(hidden - move, TANH)
            w2 = tl.load(
                w2_ptr + o_d[None, :] * stride_wd + o_k[:, None] * stride_wk,
                mask=m_k[:, None] & m_d[None, :],
                other=0.0,
            )  # [BLOCK_K, BLOCK_D]
            change = tl.dot(act, w2.to(tl.float32), change, input_precision="tf32x3")
        squares += tl.sum(change * change, axis=1)
    tl.store(norm_ptr + i_j * N + o_n, tl.sqrt(squares), mask=m_n)


def launch_rule() -> Rule:
    """One tile size for all shapes."""
    return {"BLOCK_N": 64, "BLOCK_K": 32, "BLOCK_D": 64, "num_warps": 8, "num_stages": 2}


def perturbation_scores_triton(
    hidden: Tensor, moves: Tensor, w2: Tensor, activation: Activation
) -> Tensor:
    """Launch the kernel; arguments as in `perturbation_scores_reference`."""
    tokens = hidden.flatten(0, -2)
    N, Dh = tokens.shape
    rule = launch_rule()
    norms = torch.empty(len(moves), N, dtype=torch.float32, device=hidden.device)
    launch(
        perturbation_scores_kernel,
        len(moves) * ceil_div(N, rule["BLOCK_N"]),
        tokens.contiguous(),
        moves.contiguous(),
        w2,
        norms,
        *w2.stride(),
        N,
        Dh,
        w2.shape[0],
        TANH=activation == "gelu_tanh",
        **rule,
        on=hidden,
    )
    return norms.mean(0).view(hidden.shape[:-1])
