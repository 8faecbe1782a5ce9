"""Questions in batches, each processed once for all cells."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vispress.bench.subjects import Subject
from vispress.bench.tasks import Prompt

LIMIT = 2 * 2**30
"""Bytes of processed batches that are kept."""


@dataclass(frozen=True)
class Batch:
    """Some questions of a task.

    Args:
        task: Its name.
        places: Where the questions stand in the task.
        prompts: The questions.
    """

    task: str
    places: tuple[int, ...]
    prompts: tuple[Prompt, ...]


def make_batches(subject: Subject, task: str, prompts: Sequence[Prompt], size: int) -> list[Batch]:
    """All questions of a task; conversations whose texts are equally long come together.

    Args:
        subject: Whose tokens are counted.
        task: Name of the task.
        prompts: Its questions.
        size: Of a batch, at most.
    """
    order = list(range(len(prompts)))
    if any(prompt.followups for prompt in prompts):
        # rows of one batch then part only where their answers differ in length
        order.sort(key=lambda place: _lengths(subject, prompts[place]))
    return [
        Batch(task, tuple(part), tuple(prompts[place] for place in part))
        for part in (order[start : start + size] for start in range(0, len(order), size))
    ]


def _lengths(subject: Subject, prompt: Prompt) -> list[int]:
    texts = [*(text for text, _ in prompt.followups), prompt.text]
    return [len(subject.processor.tokenizer(text)["input_ids"]) for text in texts]


class Inputs:
    """Processed batches, kept while they fit; a batch that no longer fits is processed each time.

    Args:
        subject: Encodes them.
        limit: Bytes to keep.
    """

    def __init__(self, subject: Subject, limit: int = LIMIT) -> None:
        self._subject, self._left = subject, limit
        self._kept: dict[tuple[str, tuple[int, ...]], Any] = {}

    def of(self, batch: Batch) -> Any:
        """The batch's first turn, on the model's device; not to be changed."""
        key = (batch.task, batch.places)
        if key in self._kept:
            return self._kept[key]
        made = self._subject.encode(batch.prompts)
        size = sum(tensor.numel() * tensor.element_size() for tensor in made.values())
        # every cell asks in the same order: dropping the oldest would drop what comes next
        if size <= self._left:
            self._left -= size
            self._kept[key] = made
        return made
