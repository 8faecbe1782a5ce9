"""Running a plan: every cell once, stored as it finishes, resumed where it stopped."""

from collections.abc import Sequence
from pathlib import Path
from random import shuffle
from typing import Any

import torch

import vispress
from vispress.adapters.base import find_adapter
from vispress.bench.model.batches import Batch
from vispress.bench.model.loaded_model import LoadedModel, load_named_model
from vispress.bench.plan.cells import Cell
from vispress.bench.plan.plan import Plan
from vispress.bench.plan.provenance import commit, now, provenance
from vispress.bench.results.opening import open_results
from vispress.bench.results.shards import Shard, this_shard
from vispress.bench.results.store import ResultsFolder
from vispress.bench.run.applied_cell import check_cell, compressors
from vispress.bench.run.parts import Advance, Bank, answer_part, fits, put_together
from vispress.bench.tasks.task import get_task
from vispress.bench.timing.cost import measure_cost, timed_batch
from vispress.errors import BudgetError, ConfigError, UnsupportedMethodError


def run(
    plan: Plan,
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    force: bool = False,
    advance: Advance = lambda _what, _questions: None,
    shard: Shard | None = None,
    share: bool = False,
) -> None:
    """Run what is missing of a plan.

    Several processes (of `accelerate launch`, or each started alone with `share`) take parts of
    cells that no other has; all return when every cell is finished.

    Args:
        plan: What to do.
        out: Results folder; created, or continued if it is of the same plan, commit and weights.
        device: Where the model runs; `"cuda"` is a GPU for each process of a machine.
        force: Move results of another plan, commit or weights aside.
        advance: Progress; a cell found finished counts its questions too.
        shard: Which process this is; by default as the launcher says.
        share: Whether other runs of the same plan, started at any time, may work on the folder.

    Raises:
        ResultsError: The folder is in use, foreign or not writable.
        BudgetError: A method kept another number of tokens than asked.
        CheckpointError: The model's checkpoint is missing or damaged.
        UnsupportedModelError: No adapter knows the model.
        ConfigError: The launcher's variables are incomplete, a hyper-parameter does not fit the
            model, or a task shows videos to a model that takes none.
    """
    shard = this_shard() if shard is None else shard
    loaded = load_named_model(plan.model, shard.device(device), plan.dtype)
    find_adapter(loaded.model)
    if any(get_task(name).shows == "videos" for name in plan.tasks):
        loaded.check_videos()
    identity = {
        "plan": plan.digest(),
        "commit": commit(),
        "version": vispress.__version__,
        "weights": loaded.weights,
    }
    manifest = {"plan": plan.to_dict(), "tasks": _cards(plan), "created": now()}
    with open_results(
        Path(out), identity, manifest, force=force, shard=shard, share=share
    ) as folder:
        work = _Work(plan, loaded, folder, advance, _refusals(plan, loaded))
        waiting = [cell for cell in plan.cells() if not work.found(cell)]
        if not waiting:
            return
        advance("drawing questions", 0)
        work.draw()
        # processes start apart: what the cells of a method share is then computed by one of them
        start = len(waiting) * shard.rank // shard.world
        waiting = waiting[start:] + waiting[:start]
        # first what nobody works on; then wait for the rest, and take over what a dead process left
        if share:  # the others are not known
            shuffle(waiting)
        waiting = [cell for cell in waiting if not work.take(cell, wait=False)]
        for cell in waiting:
            while not work.take(cell, wait=True):  # a part was damaged in the meantime
                pass


class _Work:
    """The cells of a run, and what is needed to finish one."""

    def __init__(
        self,
        plan: Plan,
        loaded: LoadedModel,
        folder: ResultsFolder,
        advance: Advance,
        refused: dict[str, str],
    ) -> None:
        self.plan, self.loaded, self.folder, self.advance = plan, loaded, folder, advance
        self.refused = refused
        self.total = plan.questions * len(plan.tasks)
        self.counted: dict[str, int] = {}

    def draw(self) -> None:
        """Draw the questions; the same for every cell and process."""
        tasks = [get_task(name) for name in self.plan.tasks]
        drawn = {task.name: task.draw(self.plan.questions, self.plan.seed) for task in tasks}
        self.bank = Bank.of(self.plan, self.loaded, drawn)

    def found(self, cell: Cell) -> bool:
        """Tell whether a cell is finished already."""
        if self.folder.read(cell.key) is None:
            return False
        self._count(cell, self.total)
        return True

    def _count(self, cell: Cell, upto: int) -> None:
        """Tell how many questions of a cell are known to be finished, if that is news."""
        known = self.counted.get(cell.key, 0)
        if upto > known:
            self.counted[cell.key] = upto
            self.advance(cell.key, upto - known)

    def take(self, cell: Cell, *, wait: bool) -> bool:
        """Finish a cell, unless another process does; whether it is finished."""
        parts = self.bank.parts()
        if len(parts) > 1 and cell.key not in self.refused:
            return self._take_parts(cell, parts, wait=wait)
        with self.folder.claimed(cell.key, wait=wait) as mine:
            if not mine:
                return False
            if not self.found(cell):
                self._finish(cell)
            return True

    def _take_parts(self, cell: Cell, parts: list[Sequence[Batch]], *, wait: bool) -> bool:
        """Answer the parts of a cell that nobody has; put all together once they are there."""
        try:
            for number, batches in enumerate(parts):
                if self.found(cell):
                    return True
                self._take_part(cell, number, batches, wait=wait)
        except UnsupportedMethodError as error:
            self.refused[cell.key] = str(error)
            return self.take(cell, wait=True)
        with self.folder.claimed(cell.key, wait=wait) as mine:
            if not mine:
                return False
            if self.found(cell):
                return True
            stored = [self._part(cell, number, batches) for number, batches in enumerate(parts)]
            answered = [part for part in stored if part is not None]
            if len(answered) < len(parts):
                return False
            result = put_together(self.plan, self.bank, answered)
            result |= cost_of(self.plan, cell, self.loaded, self.bank, self.advance)
            self._store(cell, result)
            self._count(cell, self.total)
            return True

    def _take_part(self, cell: Cell, number: int, batches: Sequence[Batch], *, wait: bool) -> None:
        with self.folder.claimed(f"{cell.key}.part{number}", wait=wait) as mine:
            # a cell that was finished in the meantime has no parts any more
            if not mine or self.found(cell) or self._part(cell, number, batches) is not None:
                return
            self.counted[cell.key] = self.counted.get(cell.key, 0) + _size(batches)
            made = answer_part(self.plan, cell, self.loaded, self.bank, batches, self.advance)
            self.folder.write_part(cell.key, number, made)

    def _part(
        self, cell: Cell, number: int, batches: Sequence[Batch]
    ) -> list[dict[str, Any]] | None:
        """Read a part that some process has stored; None where it is missing or damaged."""
        part = self.folder.read_part(cell.key, number)
        return part if fits(part, batches) else None

    def _finish(self, cell: Cell) -> None:
        """Run one cell and store it, with the reason if it cannot be run."""
        reason = self.refused.get(cell.key)
        result: dict[str, Any] = {}
        if reason is None:
            try:
                result = run_cell(self.plan, cell, self.loaded, self.bank, self.advance)
            except UnsupportedMethodError as error:
                # only a batch shows it: pictures without a grid, questions without evidence
                reason = str(error)
        if reason is not None:
            result = {"refused": reason}
            self._count(cell, self.total)
        self._store(cell, result)

    def _store(self, cell: Cell, result: dict[str, Any]) -> None:
        made = provenance(self.loaded.model)
        stamp = {"seed": self.plan.seed, "provenance": made, "finished": now()}
        self.folder.write(cell.key, {"cell": cell.to_dict(), **result, **stamp})
        self.folder.drop_parts(cell.key)


def _size(batches: Sequence[Batch]) -> int:
    return sum(len(batch.prompts) for batch in batches)


def run_cell(
    plan: Plan, cell: Cell, loaded: LoadedModel, bank: Bank, advance: Advance
) -> dict[str, Any]:
    """Measure accuracy, kept tokens and cost of one cell, as plain data."""
    answered = answer_part(plan, cell, loaded, bank, bank.batches, advance)
    return put_together(plan, bank, [answered]) | cost_of(plan, cell, loaded, bank, advance)


def cost_of(
    plan: Plan, cell: Cell, loaded: LoadedModel, bank: Bank, advance: Advance
) -> dict[str, Any]:
    """Measure the cost of one cell; nothing where the plan asks for none."""
    timed = timed_batch(loaded, bank.prompts(), plan.timing.batch)
    if not timed:
        return {}
    advance(f"{cell.key}, timing", 0)
    chain = compressors(cell, loaded, timed, loaded.encode(timed))
    cost = measure_cost(loaded, chain, timed, plan, picture=cell.picture, saved=cell.saved)
    return {"cost": cost}


def _refusals(plan: Plan, loaded: LoadedModel) -> dict[str, str]:
    """Find the cells that this model cannot run, with the reason, before any cell runs.

    Raises:
        ConfigError: A hyper-parameter that the plan itself gives does not fit the model.
    """
    reasons = {}
    pictures = [name for name in plan.tasks if get_task(name).shows == "pictures"]
    for cell in plan.cells():
        try:
            if cell.refused is not None:
                raise BudgetError(cell.refused)
            check_cell(cell, loaded, plan.positions, pictures=pictures)
        except (BudgetError, UnsupportedMethodError) as error:
            reasons[cell.key] = str(error)
        except ConfigError as error:
            if not cell.optional:
                raise
            reasons[cell.key] = str(error)
    return reasons


def _cards(plan: Plan) -> dict[str, Any]:
    tasks = [get_task(name) for name in plan.tasks]
    cards = {}
    for task in tasks:
        where = {} if task.folder is None else {"folder": task.folder}
        cards[task.name] = {"chance": task.chance, "needs": task.needs} | where
    return cards
