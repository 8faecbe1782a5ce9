"""Applying a cell to the model, for one batch: compress it, or hand it smaller pictures."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vispress.adapters.base import find_adapter
from vispress.api import compression_report
from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.plan.cells import Cell
from vispress.bench.plan.downsample import any_size, smaller
from vispress.bench.plan.oracle import Oracle, with_evidence
from vispress.bench.plan.saved import compressed_by
from vispress.bench.run.budget_check import KeptTokens, check_budget
from vispress.bench.tasks.task import Prompt
from vispress.errors import UnsupportedMethodError
from vispress.methods.base import Compressor
from vispress.types import Positions


@dataclass(frozen=True)
class AppliedCell:
    """A batch while the model is as the cell has it.

    Args:
        inputs: For the model.
        tokens: Visual tokens of the batch at the usual size, and now; None where the compression
            report says it.
    """

    inputs: Any
    tokens: tuple[int, int] | None = None


@contextmanager
def apply_cell(
    cell: Cell,
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    inputs: Any,
    positions: Positions | None = None,
) -> Iterator[AppliedCell]:
    """Apply a cell to the model for one batch; afterwards the model is as it was.

    Args:
        cell: What is done.
        loaded: The model, uncompressed.
        prompts: The batch.
        inputs: As the loaded model encodes it.
        positions: As in `compress_model`.

    Raises:
        UnsupportedMethodError: The model cannot run the cell, or the prompts lack what it needs.
        BudgetError: A budget cannot be reached.
    """
    if cell.picture is not None:
        made = smaller(cell.picture, loaded, inputs, prompts)
        with any_size(loaded.model):
            yield AppliedCell(made.inputs, (sum(made.native), sum(made.kept)))
        return
    if not cell.chain:
        ids = [*find_adapter(loaded.model).placeholders().values()]
        marks = torch.isin(inputs["input_ids"], torch.tensor(ids, device=loaded.device))
        yield AppliedCell(inputs, (int(marks.sum()),) * 2)
        return
    chain = compressors(cell, loaded, prompts, inputs)
    with compressed_by(loaded.model, chain, cell.saved, positions):
        yield AppliedCell(inputs)


def compressors(
    cell: Cell, loaded: LoadedModel, prompts: Sequence[Prompt], inputs: Any
) -> list[Compressor]:
    """Make the chain of a cell for one batch: the oracle is told where its evidence is.

    Raises:
        UnsupportedMethodError: The prompts do not say it, or the model has no grid for it.
    """
    return [
        with_evidence(method, loaded.model, inputs, prompts)
        if isinstance(method, Oracle)
        else method
        for method in cell.chain
    ]


def changes_encoder(cell: Cell) -> bool:
    """Tell whether the vision encoder computes something else than uncompressed."""
    inside = any(method.changes_encoder() for method in cell.chain)
    return cell.picture is not None or inside


def check_cell(
    cell: Cell, loaded: LoadedModel, positions: Positions | None, *, pictures: Sequence[str]
) -> None:
    """Check that the model can run a cell, as far as that shows before any prompt.

    Args:
        cell: What is to be done.
        loaded: The model.
        positions: As in `compress_model`.
        pictures: Tasks that show pictures.

    Raises:
        UnsupportedMethodError: It cannot.
        BudgetError: A budget is missing or cannot be reached.
        ConfigError: A hyper-parameter, or saved parameters, do not fit the model.
    """
    if cell.picture is not None:
        with any_size(loaded.model):
            return
    for method in cell.chain:
        if method.needs == "video" and pictures:
            raise UnsupportedMethodError(
                f"{method.name} is made for videos and leaves pictures whole, which these tasks "
                f"show: {', '.join(pictures)}"
            )
    if cell.chain:
        with compressed_by(loaded.model, cell.chain, cell.saved, positions):
            return


def answer(
    cell: Cell,
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    inputs: Any,
    *,
    max_new_tokens: int,
    positions: Positions | None,
    kept: KeptTokens,
) -> list[tuple[str, ...]]:
    """Answer one batch; what the first turn's prefill kept is checked and added to `kept`.

    Raises:
        BudgetError: A method kept another number of tokens than asked.
        UnsupportedMethodError: As `apply_cell`.
    """
    with apply_cell(cell, loaded, prompts, inputs, positions) as now:
        turns = loaded.converse(prompts, now.inputs, max_new_tokens)
        images = sum(prompt.visuals for prompt in prompts)
        if now.tokens is not None:
            kept.add_plain(images, *now.tokens)
        elif images:
            report = compression_report(loaded.model)
            check_budget(cell, report)
            kept.add(report)
    return turns
