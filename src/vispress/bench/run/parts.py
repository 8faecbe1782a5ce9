"""A cell in parts: some batches each, answered by any process, and put together in order.

Batches are those of the whole run, and what they gave is added up batch by batch, so a cell of
several processes equals that of one bit for bit. A process that dies loses the part in its hands.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from vispress.bench.model.batches import Batch, Memory, make_batches
from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.plan.cells import Cell
from vispress.bench.plan.plan import Plan
from vispress.bench.results.stats import bootstrap_mean
from vispress.bench.run.applied_cell import answer, changes_encoder
from vispress.bench.run.budget_check import KeptTokens
from vispress.bench.tasks.task import RIGHT, Prompt, Task, get_task

Advance = Callable[[str, int], None]
"""Called with what is being done and how many questions were finished."""

QUESTIONS: Final = 256
"""Of a part, about: seconds on a GPU, minutes on a CPU."""

Questions = Mapping[str, list[Prompt]]


@dataclass(frozen=True)
class Bank:
    """The questions of a run, in batches that are processed once for all cells.

    Args:
        questions: By task.
        batches: All of them, task by task.
        memory: What of them is the same for all cells.
        size: Questions of a batch, at most.
    """

    questions: Questions
    batches: Sequence[Batch]
    memory: Memory
    size: int

    @classmethod
    def of(cls, plan: Plan, loaded: LoadedModel, questions: Questions) -> "Bank":
        """Lay out the questions of a plan."""
        size = plan.batch_size
        batches = [
            batch
            for name, prompts in questions.items()
            for batch in make_batches(loaded, name, prompts, size)
        ]
        return cls(questions, batches, Memory(loaded), size)

    def parts(self) -> list[Sequence[Batch]]:
        """Deal the batches out, neighbours together."""
        each = max(1, QUESTIONS // self.size)
        return [self.batches[at : at + each] for at in range(0, len(self.batches), each)]

    def prompts(self) -> list[Prompt]:
        """List all questions."""
        return [prompt for prompts in self.questions.values() for prompt in prompts]


def answer_part(
    plan: Plan,
    cell: Cell,
    loaded: LoadedModel,
    bank: Bank,
    batches: Sequence[Batch],
    advance: Advance,
) -> list[dict[str, Any]]:
    """Answer some batches of a cell.

    Returns:
        For each batch, as plain data: the words of every turn, and what was kept.

    Raises:
        BudgetError: A method kept another number of tokens than asked.
        UnsupportedMethodError: The prompts lack what the cell needs.
    """
    found = []
    anew = changes_encoder(cell)
    for batch in batches:
        kept = KeptTokens()
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
        counts = [kept.images, kept.visual, kept.end, kept.mean]
        turns = [list(turns) for turns in answers]
        found.append({"answers": turns, "kept": counts, "notes": sorted(kept.notes)})
        advance(f"{cell.key}, {batch.task}", len(batch.prompts))
    return found


def fits(part: Any, batches: Sequence[Batch]) -> bool:
    """Tell whether stored data is what `answer_part` gives for these batches."""
    if not isinstance(part, list) or len(part) != len(batches):
        return False
    return all(_fits(data, batch) for data, batch in zip(part, batches, strict=True))


def _fits(data: Any, batch: Batch) -> bool:
    if not isinstance(data, dict) or set(data) != {"answers", "kept", "notes"}:
        return False
    answers, kept, notes = data["answers"], data["kept"], data["notes"]
    said = isinstance(answers, list) and [
        isinstance(turns, list)
        and len(turns) == 1 + len(prompt.followups)
        and all(isinstance(turn, str) for turn in turns)
        for turns, prompt in zip(answers, batch.prompts, strict=False)
    ] == [True] * len(batch.prompts) == [True] * len(answers)
    counted = isinstance(kept, list) and len(kept) == 4
    return (
        said
        and counted
        and all(isinstance(x, int | float) and x >= 0 for x in kept)
        and isinstance(notes, list)
        and all(isinstance(note, str) for note in notes)
    )


def put_together(
    plan: Plan, bank: Bank, parts: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Score a cell whose parts are all there: accuracy by task, kept tokens and notes."""
    kept = KeptTokens()
    said: dict[str, list[tuple[str, ...]]] = {
        name: [()] * len(prompts) for name, prompts in bank.questions.items()
    }
    answered = [data for part in parts for data in part]
    for batch, data in zip(bank.batches, answered, strict=True):
        for place, turns in zip(batch.places, data["answers"], strict=True):
            said[batch.task][place] = tuple(turns)
        kept.add_counts(*data["kept"], notes=data["notes"])
    tasks = {
        name: scored(get_task(name), prompts, said[name], plan.seed)
        for name, prompts in bank.questions.items()
    }
    return {"tasks": tasks, "kept": kept.to_dict(), "notes": sorted(kept.notes)}


def scored(
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
