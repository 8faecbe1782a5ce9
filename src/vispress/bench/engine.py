"""Running a plan: every cell once, stored as it finishes, resumed where it stopped."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import vispress
from vispress.api import compress_model, compression_report, remove_compression
from vispress.bench.cells import Cell
from vispress.bench.cost import measure_cost, timed_batch
from vispress.bench.plan import Plan
from vispress.bench.provenance import commit, provenance
from vispress.bench.stats import bootstrap_mean
from vispress.bench.store import ResultsFolder, open_results
from vispress.bench.subjects import Subject, load_subject
from vispress.bench.targets import Kept, check_target
from vispress.bench.tasks import Prompt, Task, get_task
from vispress.errors import BudgetError, UnsupportedMethodError

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
) -> None:
    """Run what is missing of a plan.

    Args:
        plan: What to do.
        out: Results folder; created, or continued if it is of the same plan, commit and weights.
        device: Where the model runs.
        force: Move results of another plan, commit or weights aside.
        advance: Progress; a cell found finished counts its questions too.

    Raises:
        ResultsError: The folder is in use, foreign or not writable.
        BudgetError: A method kept another number of tokens than asked.
        CheckpointError: The model's checkpoint is missing or damaged.
    """
    subject = load_subject(plan.model, device)
    identity = {
        "plan": plan.digest(),
        "commit": commit(),
        "version": vispress.__version__,
        "weights": subject.weights,
    }
    manifest = {"plan": plan.to_dict(), "tasks": _cards(plan), "created": _now()}
    with open_results(Path(out), identity, manifest, force=force) as folder:
        done = {cell.key for cell in plan.cells() if folder.read(cell.key) is not None}
        refused = _refusals(plan, subject)
        for key in sorted(done):
            advance(key, plan.questions * len(plan.tasks))
        if len(done) < len(plan.cells()):
            advance("drawing questions", 0)
            tasks = [get_task(name) for name in plan.tasks]
            questions = {task.name: task.draw(plan.questions, plan.seed) for task in tasks}
            for cell in plan.cells():
                if cell.key not in done:
                    _finish(plan, cell, subject, questions, folder, advance, refused)


def _finish(
    plan: Plan,
    cell: Cell,
    subject: Subject,
    questions: Questions,
    folder: ResultsFolder,
    advance: Advance,
    refused: Mapping[str, str],
) -> None:
    """Run one cell and store it, with the reason if it cannot be run."""
    result: dict[str, Any]
    if cell.key in refused:
        result = {"refused": refused[cell.key]}
        advance(cell.key, plan.questions * len(plan.tasks))
    else:
        result = run_cell(plan, cell, subject, questions, advance)
    stamp = {"seed": plan.seed, "provenance": provenance(subject.model), "finished": _now()}
    folder.write(cell.key, {"cell": cell.to_dict(), **result, **stamp})


def run_cell(
    plan: Plan, cell: Cell, subject: Subject, questions: Questions, advance: Advance
) -> dict[str, Any]:
    """Accuracy, kept tokens and cost of one cell, as plain data."""
    answers, kept = _ask(plan, cell, subject, questions, advance)
    tasks = {}
    for name, prompts in questions.items():
        tasks[name] = scored(get_task(name), prompts, answers[name], plan.seed)
    result = {"tasks": tasks, "kept": kept.to_dict(), "notes": sorted(kept.notes)}
    if plan.timing.batch:
        advance(f"{cell.key}, timing", 0)
        everything = [prompt for prompts in questions.values() for prompt in prompts]
        batch = timed_batch(subject, everything, plan.timing.batch)
        result["cost"] = measure_cost(subject, cell.chain, batch, plan)
    return result


def scored(task: Task, prompts: list[Prompt], answers: list[str], seed: int) -> dict[str, Any]:
    """What a cell stores of one task; `scores` are there where one is neither right nor wrong."""
    scores = [task.score(a, p) for a, p in zip(answers, prompts, strict=True)]
    fractions = {} if set(scores) <= {0.0, 1.0} else {"scores": scores}
    return {
        "questions": len(scores),
        **asdict(bootstrap_mean([scores], seed=seed)),
        "right": "".join("1" if score >= 0.5 else "0" for score in scores),
        **fractions,
        "answers": answers,
    }


def _ask(
    plan: Plan, cell: Cell, subject: Subject, questions: Questions, advance: Advance
) -> tuple[dict[str, list[str]], Kept]:
    """All answers of a cell; what is kept is read from the report of every batch."""
    answers: dict[str, list[str]] = {name: [] for name in questions}
    kept = Kept()
    with _compressed(plan, cell, subject):
        for name, prompts in questions.items():
            for start in range(0, len(prompts), plan.batch_size):
                batch = prompts[start : start + plan.batch_size]
                answers[name] += subject.answer(batch, plan.max_new_tokens)
                if cell.chain:
                    report = compression_report(subject.model)
                    check_target(cell, report)
                    kept.add(report)
                else:
                    _add_uncompressed(kept, subject, batch)
                advance(f"{cell.key}, {name}", len(batch))
    return answers, kept


@contextmanager
def _compressed(plan: Plan, cell: Cell, subject: Subject) -> Iterator[None]:
    if not cell.chain:
        yield
        return
    compress_model(subject.model, list(cell.chain), positions=plan.positions)
    try:
        yield
    finally:
        remove_compression(subject.model)


def _add_uncompressed(kept: Kept, subject: Subject, batch: list[Prompt]) -> None:
    visual = int((subject.encode(batch)["input_ids"] == subject.model.config.image_token_id).sum())
    kept.images += sum(len(prompt.images) for prompt in batch)
    kept.visual += visual
    kept.end += visual
    kept.mean += visual


def _refusals(plan: Plan, subject: Subject) -> dict[str, str]:
    """Cells that this model cannot run, with the reason; asked before any cell runs."""
    reasons = {}
    for cell in plan.cells():
        try:
            with _compressed(plan, cell, subject):
                pass
        except (BudgetError, UnsupportedMethodError) as error:
            reasons[cell.key] = str(error)
    return reasons


def _cards(plan: Plan) -> dict[str, Any]:
    tasks = [get_task(name) for name in plan.tasks]
    return {task.name: {"chance": task.chance, "needs": task.needs} for task in tasks}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
