"""What part `bandwidth` measures: each op at model sizes, with its least bytes and FLOPs."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import compiled
from benchmarks.gpu.selections import (
    cover_case,
    distinct_case,
    dpp_case,
    kmeans_case,
    maxmin_case,
)
from benchmarks.gpu.sizes import Case, Size, tokens, whole
from vispress_kernels.assign_nearest import assign_nearest
from vispress_kernels.assign_nearest.reference import assign_nearest_reference
from vispress_kernels.column_attention import column_attention
from vispress_kernels.dct_lowpass import dct_lowpass, lowpass_basis
from vispress_kernels.dct_lowpass.reference import dct_lowpass_reference
from vispress_kernels.gather_tokens import gather_tokens
from vispress_kernels.gather_tokens.reference import gather_tokens_reference
from vispress_kernels.merge_tokens import merge_tokens
from vispress_kernels.merge_tokens.reference import merge_tokens_reference
from vispress_kernels.perturbation_scores import perturbation_scores
from vispress_kernels.query_attention import query_attention
from vispress_kernels.query_attention.reference import query_attention_reference
from vispress_kernels.transition_scores import transition_scores
from vispress_kernels.transition_scores.reference import transition_scores_reference


def gather_case(size: Size, device: torch.device) -> Case:
    """A quarter of the tokens, ascending."""
    x, K = tokens(size, device), max(1, size.N // 4)
    keep = torch.randperm(size.N, device=device)[:K].sort().values[None]
    return Case(
        "gather_tokens",
        lambda: gather_tokens(x, keep, backend="triton"),
        lambda: gather_tokens(x, keep, backend="torch"),
        "bytes",
        2 * K * size.D * x.element_size() + 8 * K,
        compiled=whole(gather_tokens_reference, x, keep),
    )


def merge_case(size: Size, device: torch.device) -> Case:
    """Every token into one of a quarter as many groups, weighted."""
    x, K = tokens(size, device), max(1, size.N // 4)
    assign = torch.randint(K, (1, size.N), device=device)
    weight = torch.rand(1, size.N, device=device)
    return Case(
        "merge_tokens",
        lambda: merge_tokens(x, assign, K, weight=weight, backend="triton"),
        lambda: merge_tokens(x, assign, K, weight=weight, backend="torch"),
        "bytes",
        (size.N + K) * size.D * x.element_size() + 12 * size.N,
        compiled=whole(merge_tokens_reference, x, assign, weight, K),
    )


def query_case(size: Size, device: torch.device) -> Case:
    """The last token's row, averaged over heads, as FastV reads it."""
    q = torch.randn(1, size.heads, 1, size.head, device=device, dtype=torch.bfloat16)
    k = torch.randn(1, size.kv_heads, size.N, size.head, device=device, dtype=torch.bfloat16)
    scale = size.head**-0.5
    return Case(
        "query_attention",
        lambda: query_attention(q, k, mean_heads=True, backend="triton"),
        lambda: query_attention(q, k, mean_heads=True, backend="torch"),
        "bytes",
        k.numel() * k.element_size() + 4 * size.N,
        2 * size.heads * size.N * size.head,
        compiled=whole(query_attention_reference, q, k, None, None, scale, True),
    )


def column_case(size: Size, device: torch.device) -> Case | None:
    """An encoder's full attention: 16 heads of 64 (LLaVA, one sequence an image) or 80 (Qwen)."""
    if size.N > 20_000:
        return None
    wide = size.name.startswith("qwen")
    B, S = (1, size.N) if wide else (size.images, size.grid[0] * size.grid[1] + 1)
    heads, head = (4, 16) if size.name == "tiny" else (16, 80 if wide else 64)
    q, k = torch.randn(2, B, heads, S, head, device=device, dtype=torch.bfloat16)
    return Case(
        "column_attention",
        lambda: column_attention(q, k, backend="triton"),
        lambda: column_attention(q, k, backend="torch"),
        "flops",
        2 * q.numel() * q.element_size() + 4 * B * heads * S,
        2 * 2 * B * heads * S * S * head,
        compiled=lambda backend: compiled.column_attention(q, k, backend),
    )


def transition_case(size: Size, device: torch.device) -> Case:
    """A module's input and output."""
    x, y = tokens(size, device), tokens(size, device)
    return Case(
        "transition_scores",
        lambda: transition_scores(x, y, backend="triton"),
        lambda: transition_scores(x, y, backend="torch"),
        "bytes",
        2 * x.numel() * x.element_size() + 8 * size.N,
        compiled=whole(transition_scores_reference, x, y),
    )


def perturbation_case(size: Size, device: torch.device) -> Case | None:
    """ZOO-Prune's 64 directions through a projector 1024 -> D -> D."""
    if size.N > 3000:
        return None
    tiny = size.name == "tiny"
    m, width = (4, 32) if tiny else (64, 1024)
    kind: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(1, size.N, width, **kind)
    w1 = torch.randn(size.D, width, **kind) / width**0.5
    b1 = torch.randn(size.D, **kind)
    w2 = torch.randn(size.D, size.D, **kind) / size.D**0.5
    moves = torch.nn.functional.normalize(torch.randn(m, width, **kind), dim=-1)
    shared = 2 * (size.N + m) * width * size.D
    return Case(
        "perturbation_scores",
        lambda: perturbation_scores(x, w1, b1, w2, moves, backend="triton"),
        lambda: perturbation_scores(x, w1, b1, w2, moves, backend="torch"),
        "flops",
        (x.numel() + w1.numel() + w2.numel()) * 2 + 4 * size.N,
        shared + 2 * m * size.N * size.D * size.D,
        compiled=lambda backend: compiled.perturbation_scores(x, w1, b1, w2, moves, backend),
    )


def dct_case(size: Size, device: torch.device) -> Case:
    """Every image's grid to half its edges."""
    H, W = size.grid
    x = torch.randn(size.images, H * W, size.D, device=device, dtype=torch.bfloat16)
    rows = (lowpass_basis(H, H // 2) / 2).to(device, torch.float32)
    columns = lowpass_basis(W, W // 2).to(device, torch.float32)
    new = (H // 2, W // 2)
    return Case(
        "dct_lowpass",
        lambda: dct_lowpass(x, size.grid, new, backend="triton"),
        lambda: dct_lowpass(x, size.grid, new, backend="torch"),
        "bytes",
        (x.numel() + x.shape[0] * new[0] * new[1] * size.D) * x.element_size(),
        compiled=whole(dct_lowpass_reference, x, rows, columns),
    )


def assign_case(size: Size, device: torch.device) -> Case | None:
    """Every token against a quarter as many targets."""
    if size.N > 20_000:
        return None
    x, M = tokens(size, device), max(1, size.N // 4)
    targets = x[:, torch.randperm(size.N, device=device)[:M]].contiguous()
    return Case(
        "assign_nearest",
        lambda: assign_nearest(x, targets, backend="triton"),
        lambda: assign_nearest(x, targets, backend="torch"),
        "flops",
        (size.N + M) * size.D * x.element_size() + 12 * size.N,
        2 * size.N * M * size.D,
        compiled=whole(assign_nearest_reference, x, targets, False),
    )


CASES: dict[str, Callable[[Size, torch.device], Case | None]] = {
    "gather_tokens": gather_case,
    "merge_tokens": merge_case,
    "query_attention": query_case,
    "transition_scores": transition_case,
    "dct_lowpass": dct_case,
    "column_attention": column_case,
    "assign_nearest": assign_case,
    "perturbation_scores": perturbation_case,
    "maxmin_select": maxmin_case,
    "dpp_select": dpp_case,
    "cover_select": cover_case,
    "distinct_select": distinct_case,
    "kmeans_starts": kmeans_case,
}
