"""Sample questions and failures: drawn again from the plan, and asked again where the model is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vispress.api import compression_report
from vispress.bench.model.loaded_model import LoadedModel, load_named_model
from vispress.bench.model.names import REFERENCES
from vispress.bench.page.exhibits import Exhibit, Shot, exhibit, shot_of
from vispress.bench.page.questions import Pick, failures, samples, shown_cells, strangers
from vispress.bench.page.results import Results
from vispress.bench.page.sources import stored_plan
from vispress.bench.page.tables import kind_of
from vispress.bench.page.words import counted, listed
from vispress.bench.plan.cells import Cell
from vispress.bench.plan.plan import plan_from_mapping
from vispress.bench.results.stored import Stored
from vispress.bench.results.summary import BLIND
from vispress.bench.run.applied_cell import apply_cell
from vispress.bench.run.parts import Advance
from vispress.bench.tasks.task import Prompt, Task, get_task, register_task
from vispress.bench.tasks.yaml_task import stored_task
from vispress.errors import ConfigError, VispressError

Shots = dict[tuple[str, str, int], tuple[Shot, ...]]
Questions = Mapping[str, Sequence[Prompt]]


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Questions that the page shows.

    Args:
        samples: Of every task.
        failures: What most methods lose.
        notes: What could not be shown, and why; how far asking again gave the stored answers.
    """

    samples: tuple[Exhibit, ...] = ()
    failures: tuple[Exhibit, ...] = ()
    notes: tuple[str, ...] = ()


def gallery(
    results: Results,
    *,
    number: int,
    device: str | torch.device = "cpu",
    advance: Advance = lambda _what, _questions: None,
) -> Gallery:
    """Draw the questions that are shown, and see again what each method keeps of them.

    Args:
        results: A folder.
        number: Sample questions of each task.
        device: Where the model runs.
        advance: Progress.

    Raises:
        CheckpointError: The plan's model is at hand but damaged.
        ConfigError: The device cannot be used.
    """
    picked = samples(results, number), failures(results)
    notes: list[str] = []
    advance("drawing questions", 0)
    prompts = _draw(results, {pick.task for picks in picked for pick in picks}, notes)
    kept = [[pick for pick in picks if pick.task in prompts] for picks in picked]
    loaded = _loaded(results, device, notes)
    shots: Shots = {}
    if loaded is not None:
        shots = _ask_again(results, loaded, [*kept[0], *kept[1]], prompts, notes, advance)
    cells = _cells(results)
    kinds = {cell["cell"]["group"]: kind_of(results, cell["cell"]["group"]) for cell in cells}
    exhibits = [
        tuple(
            exhibit(pick, prompts[pick.task][pick.index], cells, kinds, shots, loaded)
            for pick in picks
        )
        for picks in kept
    ]
    return Gallery(samples=exhibits[0], failures=exhibits[1], notes=tuple(notes))


def _cells(results: Results) -> list[Stored]:
    """Choose whose answers are shown: uncompressed, blind, then all groups."""
    first = [results.baseline] if results.baseline is not None else []
    blind = [c for c in results.answered if c["cell"]["group"] == BLIND]
    return [*first, *blind, *shown_cells(results)]


def _draw(results: Results, tasks: set[str], notes: list[str]) -> Questions:
    """Draw all questions of the tasks; those that are not what was asked are left out."""
    prompts, scores = {}, {}
    for task in results.plan["tasks"]:
        if task not in tasks:
            continue
        try:
            known = _task(results, task)
            prompts[task] = known.draw(results.plan["questions"], results.plan["seed"])
            scores[task] = known.score
        except ConfigError as error:
            notes.append(f"{task}: its questions cannot be drawn here ({error})")
    foreign = strangers(results, prompts, scores)
    if foreign:
        notes.append(
            f"{listed(foreign)}: the questions drawn here are not those that were asked (the "
            "results are of another commit), so they are not shown"
        )
    return {task: asked for task, asked in prompts.items() if task not in foreign}


def _task(results: Results, name: str) -> Task:
    """Find a task by name, or make it again, known by its name, as the plan described it."""
    source = results.plan.get("sources", {}).get(name)
    if source is None:
        return get_task(name)
    folder = results.manifest["tasks"][name].get("folder", ".")
    return register_task(stored_task(source, Path(folder)))


def _loaded(results: Results, device: str | torch.device, notes: list[str]) -> LoadedModel | None:
    """Load the plan's model, if it is here and has the weights that were measured."""
    name = results.plan["model"]
    if name not in REFERENCES and not Path(name).is_dir():
        notes.append(f"kept tokens are not shown: the model {name!r} is not at hand")
        return None
    loaded = load_named_model(name, device, results.plan["dtype"])
    measured = results.manifest["identity"]["weights"]
    if loaded.weights != measured:
        notes.append(
            f"kept tokens are not shown: the weights of {name!r} here are {loaded.weights}, "
            f"measured were {measured}"
        )
        return None
    return loaded


def _cells_again(results: Results, notes: list[str]) -> dict[str, Cell]:
    """Make the stored plan's cells again, where this version makes what was measured."""
    try:
        plan = plan_from_mapping(stored_plan(results.plan), "the stored plan")
    except VispressError as error:
        files = [f"--import {name}" for name in results.plan.get("imports", {})]
        hint = f"; it was run with {' '.join(files)}" if files else ""
        notes.append(
            f"kept tokens are not shown: the stored plan cannot be made here ({error}{hint})"
        )
        return {}
    made = {cell.key: cell for cell in plan.cells()}
    stored = {cell["key"]: cell for cell in results.plan["cells"]}
    return {key: cell for key, cell in made.items() if cell.to_dict() == stored.get(key)}


def _ask_again(
    results: Results,
    loaded: LoadedModel,
    picks: Sequence[Pick],
    prompts: Questions,
    notes: list[str],
    advance: Advance,
) -> Shots:
    """Ask the shown questions again, and note what every shown cell keeps."""
    shots: Shots = {}
    asked = differ = 0
    cells = _cells_again(results, notes)
    batches = {
        task: sorted({pick.index for pick in picks if pick.task == task}) for task in prompts
    }
    for stored in shown_cells(results):
        cell = cells.get(stored["key"])
        # smaller pictures drop no tokens that could be shown
        if cell is None or not cell.chain:
            continue
        advance(f"{cell.key}, pictures", 0)
        for task, indices in batches.items():
            batch = [prompts[task][i] for i in indices]
            if not any(prompt.images for prompt in batch):
                continue
            answers, kept = _watch(cell, loaded, batch, results)
            for i, answer, seen in zip(indices, answers, kept, strict=True):
                shots[cell.key, task, i] = seen
                asked += 1
                differ += answer != stored["tasks"][task]["answers"][i]
    if asked:
        notes.append(_agreement(asked, differ))
    return shots


def _watch(
    cell: Cell, loaded: LoadedModel, batch: Sequence[Prompt], results: Results
) -> tuple[list[str], list[tuple[Shot, ...]]]:
    """Answer a batch, and note what was kept of each picture that is not composed of crops."""
    limit, positions = results.plan["max_new_tokens"], results.plan["positions"]
    with apply_cell(cell, loaded, batch, loaded.encode(batch), positions) as now:
        turns = loaded.converse(batch, now.inputs, limit)
        report = compression_report(loaded.model)
    kept = []
    for prompt, sample in zip(batch, report.samples, strict=True):
        evidence = prompt.evidence or ((),) * len(prompt.images)
        pairs = zip(sample.images, evidence, strict=True)
        shots = [shot_of(image, cells) for image, cells in pairs]
        whole = tuple(shot for shot in shots if shot is not None)
        kept.append(whole if len(whole) == len(shots) else ())
    return [" / ".join(answers) for answers in turns], kept


def _agreement(asked: int, differ: int) -> str:
    if not differ:
        return f"asked again for these pictures, the model gave all {asked} stored answers"
    return (
        f"asked again for these pictures, the model answered {differ} of "
        f"{counted(asked, 'question')} differently than when it was measured (another machine or "
        "batch); answers shown are the stored ones"
    )
