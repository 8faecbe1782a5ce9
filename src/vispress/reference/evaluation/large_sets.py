"""Held-out questions about large pictures, with crops or with the thumbnail's pixels alone."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

import numpy as np
from PIL import Image

from vispress.checks import check_choice, check_integer
from vispress.reference.evaluation.evaluate import by_kind, generate_words, share_right
from vispress.reference.world.large import FIELDS, ask_large, draw_large
from vispress.reference.world.questions import Question
from vispress.reference.world.scenes import IMAGE_SIZE
from vispress.reference.world.words import LARGE_KINDS, LargeKind

_ANSWERS: Final[dict[LargeKind, int]] = {"fine_print": 100, "small_object": 8, "across_crops": 4}


@dataclass(frozen=True, slots=True)
class LargeQuestion:
    """One held-out question about a large picture.

    Args:
        kind: One of `LARGE_KINDS`.
        image: RGB, 192 x 192, 192 x 96 or 96 x 192.
        question: Text, answer, and evidence in 12 x 12 cells over the whole picture.
    """

    kind: LargeKind
    image: Image.Image
    question: Question


def held_out_large(kind: LargeKind, n: int, *, seed: int = 0) -> list[LargeQuestion]:
    """Draw held-out questions: unseen pictures, unseen handwriting, balanced answers.

    Args:
        kind: One of `LARGE_KINDS`.
        n: How many; each has a picture of its own, square, wide and tall in turn.
        seed: Other seeds give other pictures; none is ever trained on.

    Returns:
        `n` questions; equal arguments give equal ones. No answer is right more often than
        `ceil(n / number of answers)` times.

    Raises:
        ConfigError: `kind` is unknown or `n` is not positive.
    """
    check_choice("kind", kind, LARGE_KINDS)
    check_integer("n", n, low=1)
    most = -(-n // _ANSWERS[kind])
    taken: Counter[str] = Counter()
    drawn: list[LargeQuestion] = []
    for index in count():
        fields = FIELDS[len(drawn) % len(FIELDS)]
        scene = draw_large(seed, "test", index, fields)
        rng = np.random.default_rng((seed, 3, index))
        for question in ask_large(scene, fields, kind, rng):
            if taken[question.answer] < most:
                taken[question.answer] += 1
                drawn.append(LargeQuestion(kind, Image.fromarray(scene.pixels), question))
                break
        if len(drawn) == n:
            return drawn
    raise AssertionError("unreachable")


def large_answers(
    model: Any,
    processor: Any,
    questions: Iterable[LargeQuestion],
    *,
    thumbnail: bool = False,
    batch: int = 16,
) -> list[str]:
    """Answer questions about large pictures, as `generate_answers` does about small ones.

    Args:
        model: The model, compressed or not.
        processor: Its processor.
        questions: What to ask.
        thumbnail: Show the model the picture at 96 x 96 pixels, which is all its thumbnail has.
        batch: Prompts at a time.

    Returns:
        The generated words, in order.
    """
    questions = list(questions)
    images = [q.image for q in questions]
    if thumbnail:
        size = (IMAGE_SIZE, IMAGE_SIZE)
        images = [image.resize(size, Image.Resampling.BICUBIC) for image in images]
    texts = [q.question.prompt for q in questions]
    return generate_words(model, processor, texts, batch=batch, images=images)


def large_accuracy(
    model: Any,
    processor: Any,
    *,
    n: int,
    seed: int = 0,
    thumbnail: bool = False,
    kinds: Iterable[LargeKind] = LARGE_KINDS,
) -> dict[str, float]:
    """Measure the share of exactly right answers by kind, on `n` held-out questions each."""

    def ask(kind: LargeKind) -> float:
        questions = held_out_large(kind, n, seed=seed)
        answers = large_answers(model, processor, questions, thumbnail=thumbnail)
        return share_right(answers, [q.question.answer for q in questions])

    return by_kind(model, kinds, ask)
