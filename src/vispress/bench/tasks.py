"""Tasks by name: where questions come from, what blind guessing earns, which tokens they need."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vispress.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vispress.reference.words import QuestionKind

EVIDENCE_GRID: Final = 12
"""Rows, and columns, of the raster that `Prompt.evidence` counts in."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question with its pictures and its only right answer.

    Args:
        images: Pictures in the order of their `<image>` marks.
        text: What the processor is given.
        answer: Compared with the model's words, exactly.
        evidence: For each picture, the cells of a 12 x 12 raster over it (`EVIDENCE_GRID`) that
            hold the answer, whatever the model's own grid; empty where unknown.
        followups: Later turns of a conversation, (text, answer) each, asked on the same cache.
            The whole conversation is right or wrong.
    """

    images: tuple["Image", ...]
    text: str
    answer: str
    evidence: tuple[tuple[int, ...], ...] = ()
    followups: tuple[tuple[str, str], ...] = ()

    @property
    def answer_text(self) -> str:
        """All answers, joined by `" / "`: what a right conversation reads."""
        return " / ".join((self.answer, *(answer for _, answer in self.followups)))


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of question.

    Args:
        name: What plans call it.
        needs: Which visual tokens an answer needs, in words.
        chance: Accuracy of the best constant answer, in `[0, 1]`.
        draw: `draw(n, seed)` gives `n` prompts, always the same ones; the first `m` of a larger
            draw need not be those of a draw of `m`.
    """

    name: str
    needs: str
    chance: float
    draw: Callable[[int, int], list[Prompt]]


_TASKS: dict[str, Task] = {}

_NEEDS = {
    "attribute": "the few tokens of one object",
    "place": "the tokens of one ninth of the picture",
    "existence": "the tokens of every candidate",
    "needle": "one or two tokens: a dot inside an object",
    "digit": "all strokes of one handwritten digit",
    "reading": "two adjacent printed digits",
    "where": "one object, and where its tokens lie",
    "relation": "two objects, and where their tokens lie",
    "count": "every object of a kind",
}


def register_task(task: Task) -> Task:
    """Make a task available to plans.

    Raises:
        ConfigError: The name is taken.
    """
    if task.name in all_tasks():
        raise ConfigError(f"task {task.name!r} is already registered")
    _TASKS[task.name] = task
    return task


def all_tasks() -> dict[str, Task]:
    """Every task by name, the reference model's first."""
    from vispress.reference import KINDS
    from vispress.reference.questions import CHANCE

    tasks: dict[str, Task] = {
        kind: Task(kind, _NEEDS[kind], CHANCE[kind], _drawer(kind)) for kind in KINDS
    }
    return tasks | _TASKS


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: No such task; the message suggests close names.
    """
    tasks = all_tasks()
    if name not in tasks:
        raise ConfigError(f"unknown task {name!r}; {suggest(name, tasks)}")
    return tasks[name]


def suggest(name: object, known: Iterable[str]) -> str:
    """The end of an error message: close names, then all of them."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


def _drawer(kind: "QuestionKind") -> Callable[[int, int], list[Prompt]]:
    def draw(n: int, seed: int) -> list[Prompt]:
        from vispress.reference import heldout

        return [
            Prompt((image,), prompt, answer, (question.patches,))
            for image, prompt, answer, question in heldout(kind, n, seed)
        ]

    return draw
