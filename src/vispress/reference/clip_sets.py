"""Held-out questions about clips, and exact match of what the model answers."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from vispress.reference.clips import show_clip
from vispress.reference.model import MAX_NEW_TOKENS
from vispress.reference.processor import with_marks
from vispress.reference.words import CLIP_KINDS, VIDEO, ClipKind

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
        ValueError: `kind` is unknown or `n` is not positive.
    """
    if kind not in CLIP_KINDS or n < 1:
        raise ValueError(f"need a kind of {CLIP_KINDS} and n >= 1, got {kind!r} and {n}")
    forms = _FORMS[kind]
    share = -(-n // len(forms))
    taken: dict[tuple[str, str], int] = {}
    by_form = dict.fromkeys(forms, 0)
    questions: list[ClipQuestion] = []
    index = 0
    while len(questions) < n:
        clip = show_clip(seed, "test", index)
        index += 1
        for q in clip.asked:
            if q.form not in forms or by_form[q.form] >= share:
                continue
            if taken.get((q.form, q.answer), 0) >= -(-share // forms[q.form]):
                continue
            taken[q.form, q.answer] = taken.get((q.form, q.answer), 0) + 1
            by_form[q.form] += 1
            prompt = f"{VIDEO} {q.text}"
            questions.append(ClipQuestion(kind, clip.frames, prompt, q.answer, q.evidence[0]))
            break
    return questions


@torch.inference_mode()
def clip_answers(
    model: Any, processor: Any, questions: Iterable[ClipQuestion], *, batch: int = 32
) -> list[str]:
    """Greedy answers of plain `model.generate`, in left-padded batches.

    Args:
        model: The model, compressed or not.
        processor: Its processor.
        questions: What to ask.
        batch: Clips at a time.

    Returns:
        The generated words, in order.
    """
    questions = list(questions)
    answers: list[str] = []
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        inputs = processor(
            text=[with_marks(processor, q.prompt) for q in part],
            videos=[q.frames for q in part],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device, model.dtype)
        out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        answers += [a.strip() for a in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


def clip_accuracy(
    model: Any,
    processor: Any,
    *,
    n: int,
    seed: int = 0,
    kinds: Iterable[ClipKind] = CLIP_KINDS,
) -> dict[str, float]:
    """Share of exactly right answers by kind, on `n` held-out clips each."""
    was_training = model.training
    model.eval()
    scores: dict[str, float] = {}
    for kind in kinds:
        questions = held_out_clips(kind, n, seed=seed)
        answers = clip_answers(model, processor, questions)
        scores[kind] = sum(a == q.answer for a, q in zip(answers, questions, strict=True)) / n
    model.train(was_training)
    return scores
