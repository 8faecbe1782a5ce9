"""Held-out episodes: pictures and handwriting that no training has seen, answers balanced."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vispress.checks import check_choice, check_integer
from vispress.reference.evaluation.balance import balanced
from vispress.reference.world.digits import Split
from vispress.reference.world.episodes import (
    TURN_KINDS,
    TURNS,
    Evidence,
    Shown,
    episode_rng,
    show_examples,
    show_pair,
)
from vispress.reference.world.questions import ask
from vispress.reference.world.scenes import draw_scene
from vispress.reference.world.videos import show_video
from vispress.reference.world.words import EPISODE_KINDS, EpisodeKind


@dataclass(frozen=True, slots=True)
class Episode:
    """One held-out episode.

    Args:
        kind: One of `EPISODE_KINDS`.
        images: Pixels of each picture, uint8, shape (96, 96, 3).
        prompt: For the processor, with as many `<image>` marks.
        answer: One word.
        evidence: As in `Asked`; of all turns together in a conversation.
        followups: Later turns of a conversation.
    """

    kind: EpisodeKind
    images: tuple[NDArray[np.uint8], ...]
    prompt: str
    answer: str
    evidence: Evidence
    followups: tuple[tuple[str, str], ...] = ()

    @property
    def answer_text(self) -> str:
        """The answers of all turns, joined by `" / "`."""
        return " / ".join((self.answer, *(answer for _, answer in self.followups)))


_SHOW: Final[dict[EpisodeKind, tuple[Callable[[int, Split, int], Shown], dict[str, int]]]] = {
    # forms that are held-out questions, with the number of their answers
    "compare": (show_pair, {"which": 2, "color": 8}),
    "in_context": (show_examples, {"digit": 10, "shape": 8}),
    "order": (show_video, {"order": 8}),
    "change": (show_video, {"changed": 8, "last": 8}),
}


def held_out_episodes(kind: EpisodeKind, n: int, *, seed: int = 0) -> list[Episode]:
    """Draw held-out episodes: unseen pictures, unseen handwriting, balanced answers.

    Args:
        kind: One of `EPISODE_KINDS`.
        n: How many; each has pictures of its own.
        seed: Other seeds give other episodes; none is ever trained on.

    Returns:
        `n` episodes; equal arguments give equal episodes. The forms of a kind take turns, and no
        answer of a form is right more often than its share, rounded up. In conversations this
        holds, to within two, for the answers of each kind of question.

    Raises:
        ConfigError: `kind` is unknown or `n` is not positive.
    """
    check_choice("kind", kind, EPISODE_KINDS)
    check_integer("n", n, low=1)
    if kind == "multi_turn":
        return _conversations(n, seed)
    show, forms = _SHOW[kind]
    asked = balanced(lambda index: show(seed, "test", index), lambda shown: shown.asked, forms, n)
    return [
        Episode(
            kind,
            tuple(scene.pixels for scene in shown.scenes),
            f"{shown.prefix} {q.text}",
            q.answer,
            q.evidence,
        )
        for shown, q in asked
    ]


def _conversations(n: int, seed: int) -> list[Episode]:
    episodes: list[Episode] = []
    taken: dict[tuple[str, str], int] = {}
    for index in count():
        scene = draw_scene(seed, "test", (1 << 33) + index)
        rng = episode_rng(seed, "test", index, "multi_turn")
        turns = []
        for kind in (TURN_KINDS[i] for i in rng.permutation(len(TURN_KINDS))[:TURNS]):
            if not (questions := ask(scene, kind, rng)):
                break
            turns.append(min(questions, key=lambda q: taken.get((q.kind, q.answer), 0)))
        if len(turns) < TURNS:
            continue
        for q in turns:
            taken[q.kind, q.answer] = taken.get((q.kind, q.answer), 0) + 1
        seen = tuple(sorted({patch for q in turns for patch in q.patches}))
        later = tuple((q.text, q.answer) for q in turns[1:])
        first = turns[0]
        episodes.append(
            Episode("multi_turn", (scene.pixels,), first.prompt, first.answer, (seen,), later)
        )
        if len(episodes) == n:
            return episodes
    raise AssertionError("unreachable")
