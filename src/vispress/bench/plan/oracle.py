"""The oracle: a control that is told which tokens hold the answer, as an upper bound for pruning.

It keeps the evidence of all turns first and spreads what is left of the budget evenly, so that
nothing but the choice of tokens sets it apart from random. It needs prompts that say where their
evidence is, so it is no registered method: the benchmark makes one for every batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vispress.adapters.base import Grid
from vispress.bench.plan.grids import find_grids, grid_adapter
from vispress.bench.tasks.task import EVIDENCE_GRID, Prompt
from vispress.errors import ConfigError, UnsupportedMethodError
from vispress.methods._parts.geometry.grids import middles, small_grid
from vispress.methods.base import Compressor, Evidence
from vispress.types import Placement, Stage, TokenPlan, VisualTokens

_CELLS = EVIDENCE_GRID**2


@final
@dataclass(frozen=True, kw_only=True)
class Oracle(Compressor):
    """Keep the tokens that the answer needs, then an even grid; exactly the count asked.

    Args:
        pictures: Grid of steps, rows and columns, and evidence cells, of every picture (of one
            step) and video of the batch, in prompt order; cells of a step count from 144 times it.
    """

    name: ClassVar[str] = "oracle"
    summary: ClassVar[str] = "the tokens that hold the answer, then an even grid"
    paper: ClassVar[str] = "control"
    evidence: ClassVar[Evidence] = "control"

    pictures: tuple[tuple[Grid, tuple[int, ...]], ...] | None = None

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        """Choose tokens of the pictures of one grid, which come as one bucket in prompt order."""
        if self.pictures is None or tokens.grid is None:
            raise UnsupportedMethodError(
                "oracle needs the evidence of every picture and one grid over each, got "
                f"grid={tokens.grid}"
            )
        evidence = [cells for grid, cells in self.pictures if grid == tokens.grid]
        if len(evidence) != tokens.batch:
            raise UnsupportedMethodError(
                f"oracle knows the evidence of {len(evidence)} pictures of {tokens.grid} tokens, "
                f"the batch has {tokens.batch}"
            )
        keep = torch.stack([choose_tokens(cells, tokens.grid, num_keep) for cells in evidence])
        return TokenPlan(keep=keep.to(tokens.features.device))


def with_evidence(method: Oracle, model: Any, inputs: Any, prompts: Sequence[Prompt]) -> Oracle:
    """Tell an oracle where the evidence of one batch is.

    Args:
        method: The oracle, which does not know it.
        model: The model.
        inputs: The batch, as its processor makes it.
        prompts: The same batch, with its evidence.

    Raises:
        UnsupportedMethodError: A prompt does not say where its evidence is, or the family has no
            grid over the whole picture.
        ConfigError: A prompt's evidence does not fit its pictures.
    """
    adapter = grid_adapter("oracle", model)
    for prompt in prompts:
        if prompt.visuals and not prompt.evidence:
            raise UnsupportedMethodError(
                "oracle needs to know which part of the picture holds the answer; the question "
                f"{prompt.text!r} does not say. Leave these tasks out, or the oracle (controls: "
                "none)"
            )
        if len(prompt.evidence) != prompt.visuals:
            raise ConfigError(
                f"the question {prompt.text!r} has evidence of {len(prompt.evidence)} pictures and "
                f"{prompt.visuals} pictures"
            )
    images = [cells for prompt in prompts for cells in prompt.evidence[: len(prompt.images)]]
    known = list(zip(find_grids("oracle", adapter, "image", inputs), images, strict=True))
    videos = [
        (frames, cells)
        for prompt in prompts
        for frames, cells in zip(prompt.videos, prompt.evidence[len(prompt.images) :], strict=True)
    ]
    if videos:
        grids = find_grids("oracle", adapter, "video", inputs)
        for grid, (frames, cells) in zip(grids, videos, strict=True):
            shared = -(-len(frames) // grid[0])  # frames that become one step
            known.append((grid, tuple(c // _CELLS // shared * _CELLS + c % _CELLS for c in cells)))
    return replace(method, pictures=tuple(known))


def choose_tokens(cells: Iterable[int], grid: Grid, num_keep: int) -> Tensor:
    """Choose the tokens to keep of a picture or video: evidence first, the rest evenly.

    Args:
        cells: Evidence, on a raster of 12 x 12 over the picture or each step.
        grid: Steps, rows and columns of tokens.
        num_keep: K, at most the number of tokens; evidence beyond it is thinned at equal steps.

    Returns:
        Ascending indices `[K]`.
    """
    needed = evidence_tokens(cells, grid).nonzero()[:, 0]
    if len(needed) >= num_keep:
        return needed[middles(len(needed), num_keep)]
    steps, height, width = grid
    taken = torch.zeros(steps * height * width, dtype=torch.bool)
    taken[needed] = True
    if share := (num_keep - len(needed)) // steps:
        rows, columns = small_grid(height, width, share)
        even = middles(height, rows)[:, None] * width + middles(width, columns)
        taken.view(steps, -1)[:, even.flatten()] = True
    # even tokens that are evidence leave some of the budget: it goes to equal steps of the rest
    rest = (~taken).nonzero()[:, 0]
    taken[rest[middles(len(rest), num_keep - int(taken.sum()))]] = True
    return taken.nonzero()[:, 0]


def evidence_tokens(cells: Iterable[int], grid: Grid) -> Bool[Tensor, "N"]:
    """Mark the tokens whose area overlaps one of the cells.

    Args:
        cells: Evidence, on a raster of 12 x 12 over the picture or each step.
        grid: Steps, rows and columns of tokens.

    Raises:
        ConfigError: A cell is outside the raster.
    """
    steps, height, width = grid
    marked = torch.zeros(steps * _CELLS, dtype=torch.float64)
    for cell in cells:
        if not 0 <= cell < len(marked):
            raise ConfigError(f"evidence cells must be in [0, {len(marked)}), got {cell}")
        marked[cell] = 1
    raster = marked.view(steps, EVIDENCE_GRID, EVIDENCE_GRID)
    area = _overlap(height) @ raster @ _overlap(width).T
    # ends of intervals that only touch differ in their last bits
    return (area > 1e-9).flatten()


def _overlap(count: int) -> Float[Tensor, "count cells"]:
    """Measure what each of `count` equal parts of `[0, 1]` shares with each row of the raster."""
    part = torch.arange(count + 1, dtype=torch.float64) / count
    cell = torch.arange(EVIDENCE_GRID + 1, dtype=torch.float64) / EVIDENCE_GRID
    start = torch.maximum(part[:-1, None], cell[None, :-1])
    end = torch.minimum(part[1:, None], cell[None, 1:])
    return (end - start).clamp(min=0)
