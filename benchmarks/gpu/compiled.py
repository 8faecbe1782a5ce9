"""`torch.compile` of references that are loops: the step is compiled, the loop stays in Python.

Unrolled whole, 64 to 512 steps would compile for minutes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vispress_kernels.assign_nearest.reference import unit_rows
from vispress_kernels.dpp_select.reference import dpp_start
from vispress_kernels.maxmin_select.reference import first_of_best
from vispress_kernels.perturbation_scores.reference import change_norms, first_products, scales

Call = Callable[[], Any]


def _compile(step: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return torch.compile(step, dynamic=False, backend=backend)


def column_attention(q: Tensor, k: Tensor, backend: str) -> Call:
    """Blocks of query rows as the reference takes them, without masks."""
    S, head = q.shape[2:]

    def block(queries: Tensor, keys: Tensor) -> Tensor:
        logits = queries.float() @ keys.float().transpose(-1, -2) * head**-0.5
        weights: Tensor = logits.softmax(-1)
        return weights.sum(-2)

    fast = _compile(block, backend)

    def run() -> Tensor:
        total = torch.zeros(*q.shape[:3], device=q.device)
        whole = S - S % head
        for begin in range(0, whole, head):
            total += fast(q[:, :, begin : begin + head], k)
        if whole < S:  # another shape; rarely more than one row
            total += block(q[:, :, whole:], k)
        return total / S

    return run


def perturbation_scores(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, directions: Tensor, backend: str
) -> Call:
    """One direction a step."""

    def step(hidden: Tensor, move: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        return change_norms(hidden, move, scale, weight, w2.dtype, "gelu")

    fast, nudge = _compile(step, backend), 0.01

    def run() -> Tensor:
        hidden, moves = first_products(x, w1, b1, directions, nudge)
        weight = w2.to(hidden.dtype)
        total = hidden.new_zeros(hidden.shape[:-1])
        for move, scale in zip(moves.unbind(), scales(moves).unbind(), strict=True):
            total += fast(hidden, move, scale, weight)
        return total / len(moves) / (2 * nudge)

    return run


def maxmin_select(x: Tensor, weight: Tensor, num_keep: int, backend: str) -> Call:
    """One token a step."""
    B, N, _ = x.shape
    batch = torch.arange(B, device=x.device)

    def step(
        unit: Tensor, nearest: Tensor, chosen: Tensor, pick: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        chosen = chosen.index_put((batch, pick), torch.ones_like(chosen[:1, 0]))
        distance = 1 - (unit @ unit[batch, pick][..., None])[..., 0]
        nearest = torch.minimum(nearest, distance)
        return nearest, chosen, first_of_best(nearest * weight, chosen)

    fast, start = _compile(step, backend), torch.compile(unit_rows, backend=backend)

    def run() -> Tensor:
        unit, pick = start(x), first_of_best(weight)
        nearest = unit.new_full((B, N), float("inf"))
        chosen = torch.zeros(B, N, dtype=torch.bool, device=x.device)
        order = torch.empty(B, num_keep, dtype=torch.int64, device=x.device)
        for number in range(num_keep):
            order[:, number] = pick
            nearest, chosen, pick = fast(unit, nearest, chosen, pick)
        return order

    return run


def dpp_select(x: Tensor, relevance: Tensor, num_keep: int, backend: str) -> Call:
    """One token a step, the factor at full height (zeros add nothing), for one static shape."""
    B, N, D = x.shape
    batch = torch.arange(B, device=x.device)
    rank = min(num_keep, D)

    def step(
        unit: Tensor, r: Tensor, gain: Tensor, floor: Tensor, factor: Tensor, chosen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pick = first_of_best(gain, chosen)
        found = gain[batch, pick] > floor
        pick = torch.where(found, pick, first_of_best(r, chosen))
        row = (unit @ unit[batch, pick][..., None])[..., 0] * r * r[batch, pick][:, None]
        row = row - (factor[batch, :, pick][:, None] @ factor)[:, 0]
        root = gain[batch, pick].clamp(min=floor).sqrt().clamp(min=1e-30)
        column = torch.where(found[:, None], row / root[:, None], 0.0)
        gain = (gain - column.square()).clamp(min=0.0)
        chosen = chosen.index_put((batch, pick), torch.ones_like(chosen[:1, 0]))
        return pick, column, gain, chosen

    fast, start = _compile(step, backend), torch.compile(unit_rows, backend=backend)

    def run() -> Tensor:
        unit = start(x)
        r, gain, floor = dpp_start(x, relevance)
        chosen = torch.zeros(B, N, dtype=torch.bool, device=x.device)
        factor = unit.new_zeros(B, rank, N)
        order = torch.empty(B, num_keep, dtype=torch.int64, device=x.device)
        for number in range(num_keep):
            pick, column, gain, chosen = fast(unit, r, gain, floor, factor, chosen)
            order[:, number] = pick
            if number < rank:
                factor[:, number] = column
        return order

    return run


def cover_select(x: Tensor, fit: Tensor, num_keep: int, backend: str) -> Call:
    """One token a step, of similarities that are held."""
    B, N, _ = x.shape
    batch = torch.arange(B, device=x.device)

    def step(
        similar: Tensor, best: Tensor, chosen: Tensor, fit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gain = (similar - best[..., None]).clamp(min=0).sum(1) + fit
        top, pick = gain.masked_fill(chosen, float("-inf")).max(1)
        chosen = chosen.index_put((batch, pick), torch.ones_like(chosen[:1, 0]))
        return top, pick, torch.maximum(best, similar[batch, :, pick]), chosen

    def begin(tokens: Tensor) -> Tensor:
        unit = unit_rows(tokens)
        return (unit @ unit.mT).add(1).div(2).clamp(min=0)

    fast, start = _compile(step, backend), torch.compile(begin, backend=backend)

    def run() -> tuple[Tensor, Tensor]:
        similar = start(x)
        best, chosen = similar.new_zeros(B, N), torch.zeros(B, N, dtype=torch.bool, device=x.device)
        order = torch.empty(B, num_keep, dtype=torch.int64, device=x.device)
        gains = similar.new_empty(B, num_keep)
        for number in range(num_keep):
            gains[:, number], order[:, number], best, chosen = fast(similar, best, chosen, fit)
        return order, gains

    return run


def distinct_select(x: Tensor, num_keep: int, step: int, backend: str) -> Call:
    """One round a step, of cosines that are held; one binary for lists of all lengths."""
    B, N, _ = x.shape
    batch = torch.arange(B, device=x.device)[:, None, None]

    def sort(cosine: Tensor, even: Tensor, odd: Tensor) -> Tensor:
        nearest = cosine[batch, even[:, :, None], odd[:, None]].amax(2)
        return nearest.sort(dim=1, stable=True, descending=True).indices

    def begin(tokens: Tensor) -> Tensor:
        unit = unit_rows(tokens)
        return unit @ unit.mT

    fast = torch.compile(sort, dynamic=True, backend=backend)
    start = torch.compile(begin, backend=backend)

    def run() -> Tensor:
        cosine, left = start(x), torch.arange(N, device=x.device).expand(B, -1)
        while left.shape[1] > num_keep:
            even, odd = left[:, 0::2].contiguous(), left[:, 1::2].contiguous()
            drop = min(step, left.shape[1] - num_keep, even.shape[1])
            left = torch.cat([even.gather(1, fast(cosine, even, odd)[:, drop:]), odd], dim=1)
        return left

    return run


def kmeans_starts(x: Tensor, drawn: Tensor, backend: str) -> Call:
    """One token a step."""
    B, N, _ = x.shape
    batch = torch.arange(B, device=x.device)

    def step(unit: Tensor, distance: Tensor, pick: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        apart = 1 - (unit @ unit[batch, pick][..., None])[..., 0]
        distance = torch.minimum(apart.clamp(min=0), distance)
        mass = distance.square().cumsum(1)
        below = mass[:, :-1].contiguous()
        return distance, torch.searchsorted(below, mass[:, -1:] * at, right=True)[:, 0]

    fast, start = _compile(step, backend), torch.compile(unit_rows, backend=backend)

    def run() -> Tensor:
        unit = start(x)
        pick = (drawn[:1] * N).long().clamp(max=N - 1).expand(B)
        distance, picks = unit.new_full((B, N), float("inf")), [pick]
        for number in range(1, len(drawn)):
            distance, pick = fast(unit, distance, pick, drawn[number])
            picks.append(pick)
        return torch.stack(picks, dim=1)

    return run
