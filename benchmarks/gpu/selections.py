"""Cases of part `bandwidth` that choose tokens one by one: greedy selections, and their floors."""

import torch
from torch import Tensor

from benchmarks.gpu import compiled
from benchmarks.gpu.sizes import Case, Size, tokens
from vispress_kernels.cover_select import cover_select
from vispress_kernels.distinct_select import distinct_select
from vispress_kernels.dpp_select import dpp_select
from vispress_kernels.kmeans_starts import kmeans_starts
from vispress_kernels.maxmin_select import maxmin_select


def _num_keep(size: Size) -> int:
    """A ninth, as 64 of 576; at most 512, to keep the loops of the references short."""
    return max(2, min(512, size.N // 9))


def _greedy_floor(x: Tensor, K: int, columns: int = 0) -> tuple[int, int]:
    """Bytes and FLOPs of a greedy selection: one product of all tokens, then a row of it a step.

    Args:
        x: Tokens.
        K: Steps.
        columns: Of a factor, `[N]` each, that the steps read beside.
    """
    B, N, D = x.shape
    return x.numel() * x.element_size() + 4 * B * N * (K + columns), 2 * B * N * N * D


def maxmin_case(size: Size, device: torch.device) -> Case | None:
    """Weighted farthest points (the first by weight: `assign_nearest` is measured by itself)."""
    if size.N > 20_000:
        return None
    x, K = tokens(size, device), _num_keep(size)
    weight = torch.rand(1, size.N, device=device)
    return Case(
        "maxmin_select",
        lambda: maxmin_select(x, K, weight=weight, backend="triton"),
        lambda: maxmin_select(x, K, weight=weight, backend="torch"),
        "flops",
        *_greedy_floor(x, K),
        compiled=lambda backend: compiled.maxmin_select(x, weight, K, backend),
    )


def dpp_case(size: Size, device: torch.device) -> Case | None:
    """Greedy MAP with random relevance."""
    if size.N > 20_000:
        return None
    x, K = tokens(size, device), _num_keep(size)
    relevance = torch.rand(1, size.N, device=device) + 0.1
    return Case(
        "dpp_select",
        lambda: dpp_select(x, relevance, K, backend="triton"),
        lambda: dpp_select(x, relevance, K, backend="torch"),
        "flops",
        *_greedy_floor(x, K, columns=K * K // 2),
        compiled=lambda backend: compiled.dpp_select(x, relevance, K, backend),
    )


MOST_WHOLE = 4096
"""Tokens up to which kernels hold all cosines of a sample; beyond, these ops are plain torch."""


def cover_case(size: Size, device: torch.device) -> Case | None:
    """CATP's cover; the floor counts a row of the held cosines a step, and each step reads all."""
    if size.N > MOST_WHOLE:
        return None
    x, K = tokens(size, device), _num_keep(size)
    fit = torch.rand(1, size.N, device=device)
    return Case(
        "cover_select",
        lambda: cover_select(x, fit, K, backend="triton"),
        lambda: cover_select(x, fit, K, backend="torch"),
        "flops",
        *_greedy_floor(x, K),
        compiled=lambda backend: compiled.cover_select(x, fit, K, backend),
    )


def distinct_case(size: Size, device: torch.device) -> Case | None:
    """VisPruner's rounds, an eighth of the tokens each; the floor counts pairs of the first."""
    if size.N > MOST_WHOLE:
        return None
    x, K, step = tokens(size, device), _num_keep(size), max(1, size.N // 8)
    even = (size.N + 1) // 2
    return Case(
        "distinct_select",
        lambda: distinct_select(x, K, step, backend="triton"),
        lambda: distinct_select(x, K, step, backend="torch"),
        "flops",
        x.numel() * x.element_size() + 4 * even * (size.N - even),
        2 * size.N * size.N * size.D,
        compiled=lambda backend: compiled.distinct_select(x, K, step, backend),
    )


def kmeans_case(size: Size, device: torch.device) -> Case | None:
    """VMTC's starts."""
    if size.N > MOST_WHOLE:
        return None
    x, K = tokens(size, device), _num_keep(size)
    drawn = torch.rand(K, device=device, dtype=torch.float64)
    return Case(
        "kmeans_starts",
        lambda: kmeans_starts(x, drawn, backend="triton"),
        lambda: kmeans_starts(x, drawn, backend="torch"),
        "flops",
        *_greedy_floor(x, K),
        compiled=lambda backend: compiled.kmeans_starts(x, drawn, backend),
    )
