"""One way to call each op on inputs of any size, for tests that go over all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vispress_kernels.assign_nearest import assign_nearest
from vispress_kernels.column_attention import column_attention
from vispress_kernels.cover_select import cover_select
from vispress_kernels.dct_lowpass import dct_lowpass
from vispress_kernels.distinct_select import distinct_select
from vispress_kernels.dpp_select import dpp_select
from vispress_kernels.gather_tokens import gather_tokens
from vispress_kernels.kmeans_starts import kmeans_starts
from vispress_kernels.maxmin_select import maxmin_select
from vispress_kernels.merge_tokens import merge_tokens
from vispress_kernels.perturbation_scores import perturbation_scores
from vispress_kernels.query_attention import query_attention
from vispress_kernels.transition_scores import transition_scores


@dataclass
class Case:
    """An op on some inputs.

    Args:
        tensors: By name; floating ones may be cast or laid out anew.
        call: Runs the op, as `call(tensors, backend)`.
    """

    tensors: dict[str, Tensor]
    call: Callable[[dict[str, Tensor], Any], Any]

    def run(self, backend: str, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Outputs as a tuple; `dtype` casts floating inputs first."""
        given = self.tensors
        if dtype is not None:
            given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
        out = self.call(given, backend)
        return out if isinstance(out, tuple) else (out,)

    def strided(self) -> "Case":
        """The same values with every second element of a larger tensor, last axis not dense."""
        return Case({k: spread(v) for k, v in self.tensors.items()}, self.call)


def spread(x: Tensor) -> Tensor:
    """Equal values, no axis dense: a transposed, doubled buffer."""
    if x.dim() < 2:
        return x
    buffer = x.new_zeros(*x.shape[:-2], 2 * x.shape[-1], x.shape[-2])
    view = buffer.transpose(-1, -2)[..., ::2]
    view.copy_(x)
    return view


def make(op: str, randn: Callable[..., Tensor], B: int, N: int, K: int, D: int, dtype: Any) -> Case:
    """Seeded inputs of an op: N tokens of width D, K of them kept (groups, targets, queries)."""
    return MAKERS[op](randn, B, N, K, D, dtype)


def _indices(x: Tensor, B: int, K: int, N: int) -> Tensor:
    """`[B, K]` below N, repeats allowed, out of order."""
    return (torch.arange(B * K, device=x.device) * 7919 % max(N, 1)).view(B, K)


def _gather(randn, B, N, K, D, dtype):
    x = randn(B, N, D, dtype=dtype)
    tensors = {"x": x, "keep": _indices(x, B, K, N)}
    return Case(tensors, lambda t, b: gather_tokens(t["x"], t["keep"], backend=b))


def _merge(randn, B, N, K, D, dtype):
    x = randn(B, N, D, dtype=dtype)
    tensors = {"x": x, "assign": _indices(x, B, N, K + 2) - 1, "weight": randn(B, N).abs()}
    return Case(
        tensors,
        lambda t, b: merge_tokens(
            t["x"], t["assign"], K, weight=t["weight"], reduce="mean", backend=b
        ),
    )


def _query(randn, B, N, K, D, dtype):
    q, k = randn(B, 4, min(K, 5), D, dtype=dtype), randn(B, 2, N, D, dtype=dtype)
    tensors = {"q": q, "k": k, "valid": randn(B, N) > -1}
    return Case(
        tensors,
        lambda t, b: query_attention(
            t["q"], t["k"], rows=N // 2, key_valid=t["valid"], mean_heads=True, backend=b
        ),
    )


def _column(randn, B, N, K, D, dtype):
    heads = 2 if N <= 100 else 1  # S x S work: the interpreter is slow
    q, k = randn(B, heads, N, D, dtype=dtype), randn(B, 1, N, D, dtype=dtype)
    bounds = torch.tensor([0, min(K, N), N], device=q.device)
    return Case(
        {"q": q, "k": k},
        lambda t, b: column_attention(t["q"], t["k"], cu_seqlens=bounds, backend=b),
    )


def _transition(randn, B, N, K, D, dtype):
    tensors = {"x": randn(B, N, D, dtype=dtype), "y": randn(B, N, D, dtype=dtype)}
    return Case(tensors, lambda t, b: transition_scores(t["x"], t["y"], backend=b))


def _perturbation(randn, B, N, K, D, dtype):
    hidden, out, m = 20, 33, min(K, 3) or 1
    scale = 1 / max(D, 1) ** 0.5
    tensors = {
        "x": randn(B, N, D, dtype=dtype),
        "w1": (randn(hidden, D) * scale).to(dtype),
        "b1": randn(hidden, dtype=dtype),
        "w2": (randn(out, hidden) / hidden**0.5).to(dtype),
        "u": randn(m, D, dtype=dtype),
    }
    return Case(
        tensors,
        lambda t, b: perturbation_scores(t["x"], t["w1"], t["b1"], t["w2"], t["u"], backend=b),
    )


def _dct(randn, B, N, K, D, dtype):
    # the squarest grid of N places, to about K of them
    H = max(h for h in range(1, int(max(N, 1) ** 0.5) + 1) if max(N, 1) % h == 0)
    W = max(N, 1) // H
    new = max(1, min(H, K)), max(1, min(W, K // H))
    x = randn(B, H * W, D, dtype=dtype)
    return Case({"x": x}, lambda t, b: dct_lowpass(t["x"], (H, W), new, backend=b))


def _assign(randn, B, N, K, D, dtype):
    tensors = {"x": randn(B, N, D, dtype=dtype), "targets": randn(B, max(K, 1), D, dtype=dtype)}
    return Case(tensors, lambda t, b: assign_nearest(t["x"], t["targets"], backend=b))


def _maxmin(randn, B, N, K, D, dtype):
    tensors = {"x": randn(B, N, D, dtype=dtype), "weight": randn(B, N).abs() + 0.1}
    return Case(tensors, lambda t, b: maxmin_select(t["x"], K, weight=t["weight"], backend=b))


def _dpp(randn, B, N, K, D, dtype):
    tensors = {"x": randn(B, N, D, dtype=dtype), "relevance": randn(B, N).abs() + 0.1}
    return Case(tensors, lambda t, b: dpp_select(t["x"], t["relevance"], K, backend=b))


def _cover(randn, B, N, K, D, dtype):
    tensors = {"x": randn(B, N, D, dtype=dtype), "fit": randn(B, N).abs()}
    return Case(tensors, lambda t, b: cover_select(t["x"], t["fit"], K, backend=b))


def _distinct(randn, B, N, K, D, dtype):
    tensors = {"x": randn(B, N, D, dtype=dtype)}
    return Case(tensors, lambda t, b: distinct_select(t["x"], K, max(1, N // 4), backend=b))


def _starts(randn, B, N, K, D, dtype):
    drawn = randn(K).sigmoid().double() * 0.999
    tensors = {"x": randn(B, N, D, dtype=dtype), "drawn": drawn}
    return Case(tensors, lambda t, b: kmeans_starts(t["x"], t["drawn"], backend=b))


MAKERS: dict[str, Callable[..., Case]] = {
    "gather_tokens": _gather,
    "merge_tokens": _merge,
    "query_attention": _query,
    "column_attention": _column,
    "transition_scores": _transition,
    "perturbation_scores": _perturbation,
    "dct_lowpass": _dct,
    "assign_nearest": _assign,
    "maxmin_select": _maxmin,
    "dpp_select": _dpp,
    "cover_select": _cover,
    "distinct_select": _distinct,
    "kmeans_starts": _starts,
}
OPS = tuple(MAKERS)


def agree(case: Case, assert_accurate: Callable[..., None]) -> None:
    """The kernel gives what the reference gives: copies and choices exactly, sums to rounding."""
    kernel, reference = case.run("triton"), case.run("torch")
    exact = case.run("torch", torch.float64)
    for mine, theirs, wide in zip(kernel, reference, exact, strict=True):
        assert mine.device == theirs.device
        if mine.is_floating_point():
            assert_accurate(mine, theirs, wide)
        else:
            assert torch.equal(mine, theirs)
