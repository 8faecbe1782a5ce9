"""What part `bandwidth` measures: each op at model sizes, with its least bytes and FLOPs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import compiled
from vispress_kernels.assign_nearest import assign_nearest
from vispress_kernels.assign_nearest.reference import assign_nearest_reference
from vispress_kernels.column_attention import column_attention
from vispress_kernels.cover_select import cover_select
from vispress_kernels.dct_lowpass import dct_lowpass, lowpass_basis
from vispress_kernels.dct_lowpass.reference import dct_lowpass_reference
from vispress_kernels.distinct_select import distinct_select
from vispress_kernels.dpp_select import dpp_select
from vispress_kernels.gather_tokens import gather_tokens
from vispress_kernels.gather_tokens.reference import gather_tokens_reference
from vispress_kernels.kmeans_starts import kmeans_starts
from vispress_kernels.maxmin_select import maxmin_select
from vispress_kernels.merge_tokens import merge_tokens
from vispress_kernels.merge_tokens.reference import merge_tokens_reference
from vispress_kernels.perturbation_scores import perturbation_scores
from vispress_kernels.query_attention import query_attention
from vispress_kernels.query_attention.reference import query_attention_reference
from vispress_kernels.transition_scores import transition_scores
from vispress_kernels.transition_scores.reference import transition_scores_reference

Call = Callable[[], Any]


@dataclass(frozen=True)
class Size:
    """Visual tokens of one model: N tokens of width D, and the shapes around them."""

    name: str
    N: int
    D: int
    grid: tuple[int, int]
    images: int = 1
    heads: int = 32
    kv_heads: int = 32
    head: int = 128


SIZES = {
    "llava15": Size("llava15", 576, 4096, (24, 24)),
    "llava_next": Size("llava_next", 2880, 4096, (24, 24), images=5),
    "qwen_1296": Size("qwen_1296", 1296, 3584, (36, 36), heads=28, kv_heads=4),
    "qwen_16384": Size("qwen_16384", 16384, 3584, (128, 128), heads=28, kv_heads=4),
    "video": Size("video", 131072, 3584, (64, 64), images=32, heads=28, kv_heads=4),
}
TINY = {"tiny": Size("tiny", 24, 32, (3, 4), images=2, heads=2, kv_heads=1, head=16)}
LARGE = ("qwen_16384", "video")


@dataclass(frozen=True)
class Case:
    """One op on one set of inputs.

    Args:
        op: Its name.
        kernel: The Triton launch, by its public face.
        reference: The plain torch meaning.
        bound: `"bytes"` or `"flops"`, which floor counts.
        bytes: Least bytes through memory.
        flops: Least FLOPs on the matrix units.
        compiled: Gives `torch.compile` of the reference (of its step, where it is a loop).
    """

    op: str
    kernel: Call
    reference: Call
    bound: str
    bytes: int
    flops: int = 0
    compiled: Callable[[str], Call] | None = None


def _whole(call: Callable[..., Any], *args: Any) -> Callable[[str], Call]:
    """`torch.compile` of a reference without loops."""

    def build(backend: str) -> Call:
        fast = torch.compile(call, dynamic=False, backend=backend)
        return lambda: fast(*args)

    return build


def _tokens(size: Size, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, size.N, size.D, device=device, dtype=dtype)


def gather_case(size: Size, device: torch.device) -> Case:
    """A quarter of the tokens, ascending."""
    x, K = _tokens(size, device), max(1, size.N // 4)
    keep = torch.randperm(size.N, device=device)[:K].sort().values[None]
    return Case(
        "gather_tokens",
        lambda: gather_tokens(x, keep, backend="triton"),
        lambda: gather_tokens(x, keep, backend="torch"),
        "bytes",
        2 * K * size.D * x.element_size() + 8 * K,
        compiled=_whole(gather_tokens_reference, x, keep),
    )


def merge_case(size: Size, device: torch.device) -> Case:
    """Every token into one of a quarter as many groups, weighted."""
    x, K = _tokens(size, device), max(1, size.N // 4)
    assign = torch.randint(K, (1, size.N), device=device)
    weight = torch.rand(1, size.N, device=device)
    return Case(
        "merge_tokens",
        lambda: merge_tokens(x, assign, K, weight=weight, backend="triton"),
        lambda: merge_tokens(x, assign, K, weight=weight, backend="torch"),
        "bytes",
        (size.N + K) * size.D * x.element_size() + 12 * size.N,
        compiled=_whole(merge_tokens_reference, x, assign, weight, K),
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
        compiled=_whole(query_attention_reference, q, k, None, None, scale, True),
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
    x, y = _tokens(size, device), _tokens(size, device)
    return Case(
        "transition_scores",
        lambda: transition_scores(x, y, backend="triton"),
        lambda: transition_scores(x, y, backend="torch"),
        "bytes",
        2 * x.numel() * x.element_size() + 8 * size.N,
        compiled=_whole(transition_scores_reference, x, y),
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
        compiled=_whole(dct_lowpass_reference, x, rows, columns),
    )


def assign_case(size: Size, device: torch.device) -> Case | None:
    """Every token against a quarter as many targets."""
    if size.N > 20_000:
        return None
    x, M = _tokens(size, device), max(1, size.N // 4)
    targets = x[:, torch.randperm(size.N, device=device)[:M]].contiguous()
    return Case(
        "assign_nearest",
        lambda: assign_nearest(x, targets, backend="triton"),
        lambda: assign_nearest(x, targets, backend="torch"),
        "flops",
        (size.N + M) * size.D * x.element_size() + 12 * size.N,
        2 * size.N * M * size.D,
        compiled=_whole(assign_nearest_reference, x, targets, False),
    )


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
    x, K = _tokens(size, device), _num_keep(size)
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
    x, K = _tokens(size, device), _num_keep(size)
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
    x, K = _tokens(size, device), _num_keep(size)
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
    x, K, step = _tokens(size, device), _num_keep(size), max(1, size.N // 8)
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
    x, K = _tokens(size, device), _num_keep(size)
    drawn = torch.rand(K, device=device, dtype=torch.float64)
    return Case(
        "kmeans_starts",
        lambda: kmeans_starts(x, drawn, backend="triton"),
        lambda: kmeans_starts(x, drawn, backend="torch"),
        "flops",
        *_greedy_floor(x, K),
        compiled=lambda backend: compiled.kmeans_starts(x, drawn, backend),
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
