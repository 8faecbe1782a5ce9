"""Held-out questions, and exact match of what the model generates."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Final, TypeVar

import numpy as np
import torch
from PIL import Image

from vispress.checks import check_choice, check_integer
from vispress.reference.model.llava import MAX_NEW_TOKENS
from vispress.reference.model.processor import with_marks
from vispress.reference.world.questions import Question, ask
from vispress.reference.world.scenes import draw_scene
from vispress.reference.world.words import KINDS, QuestionKind

Kind = TypeVar("Kind", bound=str)

_ANSWERS: Final[dict[QuestionKind, int]] = {
    "attribute": 16,
    "place": 8,
    "existence": 2,
    "needle": 8,
    "digit": 10,
    "reading": 100,
    "where": 9,
    "relation": 4,
    "count": 5,
}


@dataclass(frozen=True, slots=True)
class Example:
    """One held-out question with its picture.

    Args:
        image: RGB, 96 x 96.
        question: Text, answer, kind and evidence.
    """

    image: Image.Image
    question: Question


def held_out(kind: QuestionKind, n: int, *, seed: int = 0) -> list[Example]:
    """Draw held-out questions: unseen scenes, unseen handwritten digits, balanced answers.

    Args:
        kind: One of `KINDS`.
        n: How many; every question has a scene of its own.
        seed: Other seeds give other scenes; none is ever trained on.

    Returns:
        `n` examples; equal arguments give equal examples. No answer is right more often than
        `ceil(n / number of answers)` times.

    Raises:
        ConfigError: `kind` is unknown or `n` is not positive.
    """
    check_choice("kind", kind, KINDS)
    check_integer("n", n, low=1)
    most = -(-n // _ANSWERS[kind])
    taken: dict[str, int] = {}
    examples: list[Example] = []
    for index in count():
        scene = draw_scene(seed, "test", index)
        rng = np.random.default_rng((seed, 3, KINDS.index(kind), index))
        for question in ask(scene, kind, rng):
            if taken.get(question.answer, 0) < most:
                taken[question.answer] = taken.get(question.answer, 0) + 1
                examples.append(Example(Image.fromarray(scene.pixels), question))
                break
        if len(examples) == n:
            return examples
    raise AssertionError("unreachable")


@torch.inference_mode()
def generate_words(
    model: Any, processor: Any, texts: Sequence[str], *, batch: int, **shown: Sequence[Any]
) -> list[str]:
    """Answer greedily with plain `model.generate`, in left-padded batches.

    Args:
        model: The model, compressed or not.
        processor: Its processor.
        texts: Prompts of `heldout` and the like.
        batch: Prompts at a time.
        shown: `images` or `videos`, one for each prompt.

    Returns:
        The generated words, in order.
    """
    answers: list[str] = []
    for start in range(0, len(texts), batch):
        part = slice(start, start + batch)
        inputs = processor(
            text=[with_marks(processor, text) for text in texts[part]],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **{name: list(values[part]) for name, values in shown.items()},
        ).to(model.device, model.dtype)
        out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        answers += [a.strip() for a in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


def generate_answers(
    model: Any, processor: Any, examples: Iterable[Example], *, batch: int = 64
) -> list[str]:
    """Answer one question a prompt.

    Args:
        model: The model, compressed or not.
        processor: Its processor.
        examples: What to ask.
        batch: Prompts at a time.

    Returns:
        The generated words, in order.
    """
    examples = list(examples)
    texts, images = [e.question.prompt for e in examples], [e.image for e in examples]
    return generate_words(model, processor, texts, batch=batch, images=images)


def share_right(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Compute the share of exactly right answers."""
    return sum(a == b for a, b in zip(answers, wanted, strict=True)) / len(wanted)


def by_kind(model: Any, kinds: Iterable[Kind], ask: Callable[[Kind], float]) -> dict[str, float]:
    """Ask for each kind, the model in evaluation mode meanwhile."""
    was_training = model.training
    model.eval()
    scores = {str(kind): ask(kind) for kind in kinds}
    model.train(was_training)
    return scores


def accuracy(
    model: Any,
    processor: Any,
    *,
    n: int,
    seed: int = 0,
    kinds: Iterable[QuestionKind] = KINDS,
) -> dict[str, float]:
    """Measure the share of exactly right answers by kind, on `n` held-out questions each."""

    def ask_about(kind: QuestionKind) -> float:
        examples = held_out(kind, n, seed=seed)
        answers = generate_answers(model, processor, examples)
        return share_right(answers, [e.question.answer for e in examples])

    return by_kind(model, kinds, ask_about)
