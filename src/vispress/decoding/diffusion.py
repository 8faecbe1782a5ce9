"""Late-step pruning of visual tokens in masked-diffusion decoding, with a reference loop.

From a study of redundancy in diffusion multimodal LLMs, 2025, arXiv:2511.15098 (LLaDA-V).
Source: paper and code, read through a specification.
Follows the code: early denoising steps run on all visual tokens; then some are kept by DivPrune on
final-layer hidden states, from a random first one on, and the others are gone for all later steps.
Positions are kept. Nothing is cached: each step runs on the whole sequence, in both directions.
Differs: the first step to run short is a fraction of all steps (the code has 16 of 32); the states
are those of the step before it, or the embeddings where there was none; the mask token is never an
answer.
Reconstructed: `progressive`, which drops in quarters of the course; its last quarter begins before
the last step, so that it ends above `keep_ratio`. Layer skipping is not offered.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.budget import Budget, check_ratio
from vispress.checks import check_flag, check_integer, check_number
from vispress.errors import ConfigError
from vispress.flops import flops
from vispress.methods.base import upcast
from vispress.precision import full_precision
from vispress_kernels.maxmin_select import maxmin_select

Denoiser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Embeddings `[B, L, D]` and positions `[B, L]` to logits `[B, L, V]` and states `[B, L, D]`."""
Embed = Callable[[Tensor], Tensor]
"""Token ids `[B, T]` to embeddings `[B, T, D]`."""
QUARTERS = 4


@dataclass(frozen=True, kw_only=True)
class LateSteps:
    """Which denoising steps run on how many visual tokens.

    Args:
        start_fraction: Share of the steps before the first that runs short, in `[0, 1)`; the study
            has 0.25, 0.5 and 0.75.
        keep_ratio: Share of the visual tokens kept then, in `(0, 1]`.
        progressive: Fall to it in a straight line, adjusted every quarter of the steps.
        seed: Of the first token kept, at least 0; the same for every sample.

    Raises:
        ConfigError: A value is of a wrong type or out of its range.
        BudgetError: So is `keep_ratio`.
    """

    start_fraction: float = 0.5
    keep_ratio: float = 0.25
    progressive: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("start_fraction", self.start_fraction, low=0.0)
        if self.start_fraction >= 1.0:
            raise ConfigError(f"start_fraction must be below 1, got {self.start_fraction!r}")
        check_ratio("keep_ratio", self.keep_ratio)
        check_flag("progressive", self.progressive)
        check_integer("seed", self.seed, low=0)

    def counts(self, num_visual: int, steps: int) -> tuple[int, ...]:
        """Visual tokens that each of `steps` denoising steps runs on."""
        return tuple(self._count(num_visual, step, steps) for step in range(steps))

    def _count(self, num_visual: int, step: int, steps: int) -> int:
        start = int(self.start_fraction * steps)
        if step < start or not num_visual:
            return num_visual
        ratio = self.keep_ratio
        if self.progressive:
            reached = max(start, QUARTERS * step // steps * steps // QUARTERS)
            passed = (reached - start) / (steps - 1 - start) if steps - 1 > start else 1.0
            ratio = 1 - (1 - self.keep_ratio) * passed
        return Budget(keep_ratio=ratio).resolve(num_visual)

    def select(self, states: Float[Tensor, "B N D"], num_keep: int) -> Int[Tensor, "B K"]:
        """Ascending indices of a diverse set: the drawn token, then always the farthest one."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        first = int(torch.randint(states.shape[1], (1,), generator=generator))
        pivot = torch.full((len(states),), first, device=states.device)
        with full_precision():
            chosen = maxmin_select(states, num_keep, first=pivot)
        return chosen.sort(dim=1).values


@dataclass(frozen=True)
class Denoised:
    """What a course of denoising gave.

    Args:
        tokens: `[B, T]`, the answer.
        kept: `[B, K]`, visual tokens of the last step, ascending.
        lengths: Sequence length of each step.
    """

    tokens: Int[Tensor, "B T"]
    kept: Int[Tensor, "B K"]
    lengths: tuple[int, ...]

    def flops(self, num_layers: int, width: int, mlp_width: int) -> float:
        """FLOPs of all steps, as the study counts them (`fastv2`)."""
        return sum(flops([n] * num_layers, width, mlp_width, "fastv2") for n in self.lengths)


@torch.no_grad()
def denoise(
    model: Denoiser,
    embed: Embed,
    before: Int[Tensor, "B S"],
    visual: Float[Tensor, "B N D"],
    after: Int[Tensor, "B R"],
    *,
    mask_id: int,
    length: int,
    block: int,
    steps: int,
    schedule: LateSteps | None = None,
) -> Denoised:
    """Fill an answer of masks block by block, the surest tokens first (greedy, LLaDA's rule).

    Args:
        model: Runs the sequence; attends in both directions.
        embed: Its input embeddings.
        before: Prompt tokens before the visual ones.
        visual: Visual tokens in the model's embedding space.
        after: Prompt tokens behind them.
        mask_id: Token that stands for an open place.
        length: Tokens of the answer.
        block: Tokens of a block; divides `length`.
        steps: Denoising steps in all; a multiple of the blocks.
        schedule: None runs every step on all visual tokens.

    Raises:
        ConfigError: Lengths and steps do not fit.
    """
    blocks = _blocks(length, block, steps)
    B, N = visual.shape[:2]
    S, R = before.shape[1], after.shape[1]
    counts = (N,) * steps if schedule is None else schedule.counts(N, steps)
    answer = torch.full((B, length), mask_id, device=before.device)
    index = torch.arange(N, device=visual.device).expand(B, N)
    states, lengths = visual, []
    for step in range(steps):
        if schedule is not None and counts[step] < index.shape[1]:
            chosen = schedule.select(states, counts[step])
            index = index.gather(1, chosen)
        rows = torch.arange(B, device=visual.device)[:, None]
        parts = [embed(before), visual[rows, index], embed(after), embed(answer)]
        tail = torch.arange(S + N, S + N + R + length, device=index.device)
        head = torch.arange(S, device=index.device).expand(B, S)
        positions = torch.cat([head, S + index, tail.expand(B, -1)], dim=1)
        logits, hidden = model(torch.cat(parts, dim=1), positions)
        states = hidden[:, S : S + index.shape[1]]
        lengths.append(positions.shape[1])
        number, within = divmod(step, steps // blocks)
        answer = _reveal(
            answer, logits[:, -length:], mask_id, number * block, block, steps // blocks - within
        )
    return Denoised(answer, index, tuple(lengths))


def _blocks(length: int, block: int, steps: int) -> int:
    for name, value in (("length", length), ("block", block), ("steps", steps)):
        check_integer(name, value, low=1)
    if length % block:
        raise ConfigError(f"block must divide length, got block={block} and length={length}")
    blocks = length // block
    if steps % blocks or steps > length:
        raise ConfigError(
            f"steps must be a multiple of the {blocks} blocks and at most length={length}, "
            f"got {steps}"
        )
    return blocks


def _reveal(
    answer: Tensor, logits: Tensor, mask_id: int, start: int, block: int, steps_left: int
) -> Tensor:
    """Fill the surest open places of a block: an equal share of them a step, the rest early."""
    open_places = answer[:, start : start + block] == mask_id
    own = upcast(logits[:, start : start + block])
    never = torch.tensor([mask_id], device=own.device)
    sure, token = own.index_fill(-1, never, -torch.inf).softmax(dim=-1).max(dim=-1)
    order = sure.masked_fill(~open_places, -1.0).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    share = -(-open_places.sum(dim=1, keepdim=True) // steps_left)
    now = open_places & (rank < share)
    filled = torch.where(now, token, answer[:, start : start + block])
    return torch.cat([answer[:, :start], filled, answer[:, start + block :]], dim=1)
