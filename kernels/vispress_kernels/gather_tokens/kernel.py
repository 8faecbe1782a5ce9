"""`gather_tokens` as one Triton launch for all tensors: a program copies one tile of one of them.

Memory-bound: reads and writes every kept element once, plus the indices once a tile.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vispress_kernels._backend import needs_grad
from vispress_kernels._launch import ceil_div, launch, next_power_of_2

TILE = 4096  # elements: four 16-byte accesses of bf16 a thread with 4 warps
FEW = 2**20  # elements that tiles of a quarter of that spread better


@triton.jit
def _copy_tile(
    x_ptr,  # [B, N, D], any strides
    out_ptr,  # [B, K, D], contiguous
    keep_ptr,  # [B, K] int64, contiguous
    i_b,
    i_tile,
    stride_b,
    stride_n,
    stride_d,
    K,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks_d = tl.cdiv(D, BLOCK_D)
    o_k = (i_tile // blocks_d) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    o_d = ((i_tile % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)  # [BLOCK_D]
    m_k = o_k < K
    o_n = tl.load(keep_ptr + i_b * K + o_k, mask=m_k, other=0)
    mask = m_k[:, None] & (o_d < D)[None, :]
    p_x = x_ptr + i_b * stride_b + o_n[:, None] * stride_n + o_d[None, :] * stride_d
    rows = tl.load(p_x, mask=mask)  # [BLOCK_K, BLOCK_D]
    tl.store(out_ptr + (i_b * K + o_k)[:, None] * D + o_d[None, :], rows, mask=mask)


@triton.jit(do_not_specialize=["starts", "K", "tiles"])
def gather_tokens_kernel(
    xs,  # tuple of pointers, as are the next four
    outs,
    strides,
    widths,
    starts,  # first tile of each tensor, and the end
    keep_ptr,
    K,
    tiles,  # of all tensors, for one batch row
    BLOCKS: tl.constexpr,  # (BLOCK_K, BLOCK_D) of each tensor
):
    pid = tl.program_id(0)
    # int64 before any multiply: B*K*D passes 2**31 for video
    i_b = (pid // tiles).to(tl.int64)
    i_tile = pid % tiles
    for i in tl.static_range(len(xs)):
        if (i_tile >= starts[i]) & (i_tile < starts[i + 1]):
            _copy_tile(
                xs[i],
                outs[i],
                keep_ptr,
                i_b,
                i_tile - starts[i],
                strides[i][0],
                strides[i][1],
                strides[i][2],
                K,
                widths[i],
                BLOCKS[i][0],
                BLOCKS[i][1],
            )


def launch_rule(K: int, D: int) -> tuple[int, int]:
    """`(BLOCK_K, BLOCK_D)` for K rows of D elements: as wide as leaves few lanes without work."""
    tile = TILE if K * D > FEW else TILE // 4
    block_d = min(1024, tile, next_power_of_2(D))
    if D > 512 and D % 1024 > 0 and D % 512 == 0:
        block_d = min(512, block_d)
    return tile // block_d, block_d


def _launch_gather(xs: Sequence[Tensor], keep: Tensor) -> tuple[Tensor, ...]:
    B, K = keep.shape
    flat = [x.reshape(*x.shape[:2], prod(x.shape[2:])) for x in xs]
    # bytes are bytes: bool and fp8 have no plain pointer type everywhere
    flat = [x.view(torch.uint8) if x.element_size() == 1 else x for x in flat]
    outs = [torch.empty(B, K, x.shape[2], dtype=x.dtype, device=x.device) for x in flat]
    work = [(x, out) for x, out in zip(flat, outs, strict=True) if out.numel()]
    if work:
        widths = tuple(x.shape[2] for x, _ in work)
        blocks = tuple(launch_rule(B * K, D) for D in widths)
        counts = [
            ceil_div(K, bk) * ceil_div(D, bd) for D, (bk, bd) in zip(widths, blocks, strict=True)
        ]
        starts = tuple(accumulate(counts, initial=0))
        launch(
            gather_tokens_kernel,
            B * starts[-1],
            tuple(x for x, _ in work),
            tuple(out for _, out in work),
            tuple(x.stride() for x, _ in work),
            widths,
            starts,
            keep.contiguous(),
            K,
            starts[-1],
            BLOCKS=blocks,
            num_warps=4,
            on=keep,
        )
    shapes = [(B, K, *x.shape[2:]) for x in xs]
    return tuple(
        out.view(x.dtype).view(shape) for x, out, shape in zip(xs, outs, shapes, strict=True)
    )


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keep: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        outs = _launch_gather(xs, keep)
        ctx.save_for_backward(keep)
        ctx.num_tokens = [x.shape[1] for x in xs]
        ctx.mark_non_differentiable(*(out for out in outs if not out.is_floating_point()))
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        return None, *(
            scatter_tokens(grad, keep, N) if needed else None
            for grad, N, needed in zip(grads, ctx.num_tokens, wanted, strict=True)
        )


def scatter_tokens(grad: Tensor, keep: Tensor, N: int) -> Tensor:
    """The transpose of the gather: rows add up where `keep` repeats, the rest is zero."""
    B, _K = keep.shape
    out = grad.new_zeros(B * N, *grad.shape[2:])
    rows = keep + N * torch.arange(B, device=keep.device)[:, None]
    out.index_add_(0, rows.flatten(), grad.flatten(0, 1))
    return out.view(B, N, *grad.shape[2:])


def gather_tokens_triton(xs: Sequence[Tensor], keep: Tensor) -> tuple[Tensor, ...]:
    """Launch the kernel, with autograd; arguments as in `gather_tokens_many`, checked there."""
    if not needs_grad(*xs):
        return _launch_gather(xs, keep)
    outs: tuple[Tensor, ...] = _GatherTokens.apply(keep, *xs)
    return outs
