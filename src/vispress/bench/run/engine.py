"""Running a plan: every cell once, stored as it finishes, resumed where it stopped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import vispress
from vispress.adapters.base import find_adapter
from vispress.bench.model.batches import Batch, Memory, make_batches
from vispress.bench.model.loaded_model import LoadedModel, load_named_model
from vispress.bench.plan.cells import Cell
from vispress.bench.plan.plan import Plan
from vispress.bench.plan.provenance import commit, now, provenance
from vispress.bench.results.shards import Shard, this_shard
from vispress.bench.results.stats import bootstrap_mean
from vispress.bench.results.store import ResultsFolder, open_results
from vispress.bench.run.applied_cell import answer, changes_encoder, check_cell, compressors
from vispress.bench.run.budget_check import KeptTokens
from vispress.bench.tasks.task import RIGHT, Prompt, Task, get_task
from vispress.bench.timing.cost import measure_cost, timed_batch
from vispress.errors import BudgetError, ConfigError, UnsupportedMethodError

Advance = Callable[[str, int], None]
"""Called with what is being done and how many questions were finished."""

Questions = Mapping[str, list[Prompt]]


def run(
    plan: Plan,
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    force: bool = False,
    advance: Advance = lambda _what, _questions: None,
    shard: Shard | None = None,
) -> None:
    """Run what is missing of a plan.

    Started as several processes (`accelerate launch`), each takes the next cell that no other has;
    all return when every cell is finished.

    Args:
        plan: What to do.
        out: Results folder; created, or continued if it is of the same plan, commit and weights.
        device: Where the model runs; `"cuda"` is a GPU for each process of a machine.
        force: Move results of another plan, commit or weights aside.
        advance: Progress; a cell found finished counts its questions too.
        shard: Which process this is; by default as the launcher says.

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
    with open_results(Path(out), identity, manifest, force=force, shard=shard) as folder:
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
        waiting = [cell for cell in waiting if not work.take(cell, wait=False)]
        for cell in waiting:
            work.take(cell, wait=True)


class _Work:
    """The cells of a run, and what is needed to finish one."""

    def __init__(
        self,
        plan: Plan,
        loaded: LoadedModel,
        folder: ResultsFolder,
        advance: Advance,
        refused: Mapping[str, str],
    ) -> None:
        self.plan, self.loaded, self.folder, self.advance = plan, loaded, folder, advance
        self.refused = refused
        self.total = plan.questions * len(plan.tasks)

    def draw(self) -> None:
        """Draw the questions; the same for every cell and process."""
        tasks = [get_task(name) for name in self.plan.tasks]
        drawn = {task.name: task.draw(self.plan.questions, self.plan.seed) for task in tasks}
        self.bank = Bank.of(self.plan, self.loaded, drawn)

    def found(self, cell: Cell) -> bool:
        """Tell whether a cell is finished already."""
        if self.folder.read(cell.key) is None:
            return False
        self.advance(cell.key, self.total)
        return True

    def take(self, cell: Cell, *, wait: bool) -> bool:
        """Finish a cell, unless another process does; whether it is finished."""
        with self.folder.claimed(cell.key, wait=wait) as mine:
            if not mine:
                return False
            if not self.found(cell):
                self._finish(cell)
            return True

    def _finish(self, cell: Cell) -> None:
        """Run one cell and store it, with the reason if it cannot be run."""
        plan, loaded = self.plan, self.loaded
        result: dict[str, Any]
        reason = self.refused.get(cell.key)
        if reason is None:
            try:
                result = run_cell(plan, cell, loaded, self.bank, self.advance)
            except UnsupportedMethodError as error:
                # only a batch shows it: pictures without a grid, questions without evidence
                reason = str(error)
        if reason is not None:
            result = {"refused": reason}
            self.advance(cell.key, self.total)
        stamp = {"seed": plan.seed, "provenance": provenance(loaded.model), "finished": now()}
        self.folder.write(cell.key, {"cell": cell.to_dict(), **result, **stamp})


@dataclass(frozen=True)
class Bank:
    """The questions of a run, in batches that are processed once for all cells.

    Args:
        questions: By task.
        batches: All of them, task by task.
        memory: What of them is the same for all cells.
    """

    questions: Questions
    batches: Sequence[Batch]
    memory: Memory

    @classmethod
    def of(cls, plan: Plan, loaded: LoadedModel, questions: Questions) -> "Bank":
        """Lay out the questions of a plan."""
        size = plan.batch_size
        batches = [
            batch
            for name, prompts in questions.items()
            for batch in make_batches(loaded, name, prompts, size)
        ]
        return cls(questions, batches, Memory(loaded))


def run_cell(
    plan: Plan, cell: Cell, loaded: LoadedModel, bank: Bank, advance: Advance
) -> dict[str, Any]:
    """Measure accuracy, kept tokens and cost of one cell, as plain data."""
    kept = KeptTokens()
    said: dict[str, list[tuple[str, ...]]] = {
        name: [()] * len(prompts) for name, prompts in bank.questions.items()
    }
    anew = changes_encoder(cell)
    for batch in bank.batches:
        with bank.memory.shown(batch, anew=anew) as inputs:
            answers = answer(
                cell,
                loaded,
                batch.prompts,
                inputs,
                max_new_tokens=plan.max_new_tokens,
                positions=plan.positions,
                kept=kept,
            )
        for place, turns in zip(batch.places, answers, strict=True):
            said[batch.task][place] = turns
        advance(f"{cell.key}, {batch.task}", len(batch.prompts))
    tasks = {
        name: _scored(get_task(name), prompts, said[name], plan.seed)
        for name, prompts in bank.questions.items()
    }
    result = {"tasks": tasks, "kept": kept.to_dict(), "notes": sorted(kept.notes)}
    everything = [prompt for prompts in bank.questions.values() for prompt in prompts]
    if timed := timed_batch(loaded, everything, plan.timing.batch):
        advance(f"{cell.key}, timing", 0)
        chain = compressors(cell, loaded, timed, loaded.encode(timed))
        result["cost"] = measure_cost(
            loaded, chain, timed, plan, picture=cell.picture, saved=cell.saved
        )
    return result


def _scored(
    task: Task, prompts: Sequence[Prompt], conversations: Sequence[tuple[str, ...]], seed: int
) -> dict[str, Any]:
    """Convert a task's scores to what is stored; `scores` only where some are neither 0 nor 1.

    A conversation is right when all of its turns are.
    """
    answers = [" / ".join(turns) for turns in conversations]
    scores = [task.score(a, p) for a, p in zip(answers, prompts, strict=True)]
    scored: dict[str, Any] = {
        "questions": len(scores),
        **asdict(bootstrap_mean([scores], seed=seed)),
        "right": "".join("1" if score >= RIGHT else "0" for score in scores),
        "answers": answers,
    }
    if not set(scores) <= {0.0, 1.0}:
        scored["scores"] = scores
    wanted = [(p.answer, *(answer for _, answer in p.followups)) for p in prompts]
    if (most := max(map(len, wanted))) > 1:
        pairs = list(zip(conversations, wanted, strict=True))
        scored["turns"] = [
            "".join(str(int(a[turn] == w[turn])) for a, w in pairs if turn < len(w))
            for turn in range(most)
        ]
    return scored


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
