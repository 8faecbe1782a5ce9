"""Held-out questions about clips, and exact match of what the model answers."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vispress.checks import check_choice, check_integer
from vispress.reference.evaluation.balance import balanced
from vispress.reference.evaluation.evaluate import by_kind, generate_words, share_right
from vispress.reference.world.clips import show_clip
from vispress.reference.world.words import CLIP_KINDS, VIDEO, ClipKind

# forms that are held-out questions, with the number of their answers
_FORMS: Final[dict[ClipKind, dict[str, int]]] = {
    "clip_order": {"order": 8},
    "clip_change": {"changed": 8, "last": 8},
}


@dataclass(frozen=True, slots=True)
class ClipQuestion:
    """One held-out question about a clip.

    Args:
        kind: One of `CLIP_KINDS`.
        frames: uint8, shape (12, 96, 96, 3).
        prompt: For the processor; it starts with `<video>`.
        answer: One word.
        evidence: As in `Clip`.
    """

    kind: ClipKind
    frames: NDArray[np.uint8]
    prompt: str
    answer: str
    evidence: tuple[int, ...]


def held_out_clips(kind: ClipKind, n: int, *, seed: int = 0) -> list[ClipQuestion]:
    """Draw held-out questions about clips: unseen clips, unseen handwriting, balanced answers.

    Args:
        kind: One of `CLIP_KINDS`.
        n: How many; each has a clip of its own.
        seed: Other seeds give other clips; none is ever trained on.

    Returns:
        `n` questions; equal arguments give equal ones. The forms of a kind take turns, and no
        answer of a form is right more often than its share, rounded up.

    Raises:
        ConfigError: `kind` is unknown or `n` is not positive.
    """
    check_choice("kind", kind, CLIP_KINDS)
    check_integer("n", n, low=1)
    asked = balanced(
        lambda index: show_clip(seed, "test", index), lambda clip: clip.asked, _FORMS[kind], n
    )
    return [
        ClipQuestion(kind, clip.frames, f"{VIDEO} {q.text}", q.answer, q.evidence[0])
        for clip, q in asked
    ]


def clip_answers(
    model: Any, processor: Any, questions: Iterable[ClipQuestion], *, batch: int = 32
) -> list[str]:
    """Answer questions about clips, as `generate_answers` does about pictures."""
    questions = list(questions)
    texts, frames = [q.prompt for q in questions], [q.frames for q in questions]
    return generate_words(model, processor, texts, batch=batch, videos=frames)


def clip_accuracy(
    model: Any,
    processor: Any,
    *,
    n: int,
    seed: int = 0,
    kinds: Iterable[ClipKind] = CLIP_KINDS,
) -> dict[str, float]:
    """Measure the share of exactly right answers by kind, on `n` held-out clips each."""

    def ask(kind: ClipKind) -> float:
        questions = held_out_clips(kind, n, seed=seed)
        answers = clip_answers(model, processor, questions)
        return share_right(answers, [q.answer for q in questions])

    return by_kind(model, kinds, ask)
