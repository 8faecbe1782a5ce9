"""Held-out questions, and exact match of what the model generates."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from vispress.reference.model import MAX_NEW_TOKENS
from vispress.reference.processor import with_marks
from vispress.reference.questions import Question, ask
from vispress.reference.scenes import draw_scene
from vispress.reference.words import KINDS, QuestionKind

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
        ValueError: `kind` is unknown or `n` is not positive.
    """
    if kind not in KINDS or n < 1:
        raise ValueError(f"need a kind of {KINDS} and n >= 1, got {kind!r} and {n}")
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
def generate_answers(
    model: Any,
    processor: Any,
    examples: Iterable[Example],
    *,
    batch: int = 64,
) -> list[str]:
    """Greedy answers of plain `model.generate`, one question a prompt, in left-padded batches.

    Args:
        model: The model, compressed or not.
        processor: Its processor.
        examples: What to ask.
        batch: Prompts at a time.

    Returns:
        The generated words, in order.
    """
    examples = list(examples)
    answers: list[str] = []
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        inputs = processor(
            images=[e.image for e in part],
            text=[with_marks(processor, e.question.prompt) for e in part],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device, model.dtype)
        out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        answers += [a.strip() for a in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


def accuracy(
    model: Any,
    processor: Any,
    *,
    n: int,
    seed: int = 0,
    kinds: Iterable[QuestionKind] = KINDS,
) -> dict[str, float]:
    """Share of exactly right answers by kind, on `n` held-out questions each."""
    was_training = model.training
    model.eval()
    scores: dict[str, float] = {}
    for kind in kinds:
        examples = held_out(kind, n, seed=seed)
        answers = generate_answers(model, processor, examples)
        right = sum(a == e.question.answer for a, e in zip(answers, examples, strict=True))
        scores[kind] = right / n
    model.train(was_training)
    return scores
