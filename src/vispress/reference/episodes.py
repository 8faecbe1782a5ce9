"""Episodes: questions about two pictures, three frames, with examples, or in conversation.

An episode is a pure function of (seed, split, index), like a scene. Held-out episodes and training
rows come from the same functions: one set of pictures, and every question that can be asked of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, count
from math import prod
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vispress.reference.digits import Split
from vispress.reference.questions import CHANCE, Question, ask
from vispress.reference.scenes import Actor, Item, Scene, draw_cast, draw_frames, draw_scene
from vispress.reference.words import (
    COLORS,
    EPISODE_KINDS,
    IMAGE,
    SHAPES,
    EpisodeKind,
    QuestionKind,
)

PAIR: Final = f"first {IMAGE} second {IMAGE}"
FRAMES: Final = f"first {IMAGE} second {IMAGE} last {IMAGE}"
ORDINALS: Final = ("first", "second", "last")

# answers of one word, so that the turns of a batch stay aligned
TURN_KINDS: Final[tuple[QuestionKind, ...]] = (
    "attribute",
    "place",
    "existence",
    "needle",
    "digit",
    "relation",
    "count",
)
TURNS: Final = 3

_TRIPLES: Final = tuple(combinations(TURN_KINDS, TURNS))

# accuracy of the best guess from the words alone, answers being balanced
EPISODE_CHANCE: Final[dict[EpisodeKind, float]] = {
    "compare": (1 / 2 + 1 / 8) / 2,
    "in_context": (1 / 10 + 1 / 8) / 2,
    "multi_turn": sum(prod(CHANCE[k] for k in t) for t in _TRIPLES) / len(_TRIPLES),
    "order": 1 / 2,
    "change": 1 / 8,
}

Evidence = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """One question about several pictures.

    Args:
        form: Which template; answers are balanced within a form.
        text: What stands behind the pictures, ending in `:`.
        answer: One word.
        evidence: For each picture, the patches that hold the answer, ascending; possibly none.
    """

    form: str
    text: str
    answer: str
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Shown:
    """Pictures and every question asked of them.

    Args:
        scenes: The pictures.
        prefix: Words and `<image>` marks in front of every question.
        asked: The questions.
    """

    scenes: tuple[Scene, ...]
    prefix: str
    asked: tuple[Asked, ...]


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


def _rng(seed: int, split: Split, index: int, kind: EpisodeKind) -> np.random.Generator:
    part = 0 if split == "train" else 1
    return np.random.default_rng((seed, 10 + EPISODE_KINDS.index(kind), part, index))


def _shapes(scene: Scene) -> list[Item]:
    return [item for item in scene.items if item.kind == "shape"]


def show_pair(seed: int, split: Split, index: int) -> Shown:
    """Two scenes: in which of them something is, and what colour a shape has in one of them."""
    # two neighbours, far away from the scenes of other stages
    scenes = tuple(draw_scene(seed, split, (1 << 33) + 2 * index + i) for i in range(2))
    found: list[Asked] = []
    pairs = [{(s.color, s.value) for s in _shapes(scene)} for scene in scenes]
    for at, scene in enumerate(scenes):
        other = _shapes(scenes[1 - at])
        shapes = _shapes(scene)
        for color, value in sorted(pairs[at] - pairs[1 - at]):
            same = [s for s in shapes if (s.color, s.value) == (color, value)]
            text = f"which picture has a {COLORS[color]} {SHAPES[value]} ? :"
            found.append(Asked("which", text, ORDINALS[at], _beside(at, _merge(same))))
        for item in shapes:
            # the other picture must offer another answer
            if (
                sum(s.value == item.value for s in shapes) == 1
                and any(s.value == item.value for s in other)
                and all(s.color != item.color for s in other if s.value == item.value)
            ):
                text = f"what color is the {SHAPES[item.value]} in the {ORDINALS[at]} picture ? :"
                found.append(Asked("color", text, COLORS[item.color], _beside(at, item.patches)))
    order = _rng(seed, split, index, "compare").permutation(len(found))
    return Shown(scenes, PAIR, tuple(found[i] for i in order))


def _beside(at: int, patches: tuple[int, ...]) -> Evidence:
    return (patches, ()) if at == 0 else ((), patches)


def _merge(items: list[Item]) -> tuple[int, ...]:
    return tuple(sorted({patch for item in items for patch in item.patches}))


def show_examples(seed: int, split: Split, index: int) -> Shown:
    """Two examples that say whether a colour asks for the digit or the shape; then four colours.

    In every picture four colours each have one digit and one shape; even numbers ask for digits.
    """
    rng = _rng(seed, split, index, "in_context")
    form = "digit" if index % 2 == 0 else "shape"
    scenes, words, evidence = [], [], []
    for _ in range(3):
        colors = rng.permutation(len(COLORS))
        cast: list[Actor] = [("digit", int(rng.integers(10)), int(c), -1) for c in colors[:4]]
        for color in (*colors[:4], *rng.choice(colors[4:], rng.integers(1, 4))):
            dot = int((color + rng.integers(1, 8)) % 8) if rng.random() < 0.3 else -1
            cast.append(("shape", int(rng.integers(8)), int(color), dot))
        scene = draw_cast(rng, cast, split)
        scenes.append(scene)
        named = {i.color: i for i in scene.items if i.kind == form and i.color in set(colors[:4])}
        words.append({c: _called(named[c]) for c in (int(c) for c in colors[:4])})
        evidence.append({c: named[c].patches for c in words[-1]})
    prefix, seen = [], []
    for example in range(2):
        color, answer = next(iter(words[example].items()))
        prefix.append(f"{IMAGE} {COLORS[color]} : {answer}")
        seen.append(evidence[example][color])
    asked = tuple(
        Asked(form, f"{COLORS[c]} :", answer, (*seen, evidence[2][c]))
        for c, answer in words[2].items()
    )
    return Shown(tuple(scenes), f"{' '.join(prefix)} {IMAGE}", asked)


def _called(item: Item) -> str:
    return str(item.value) if item.kind == "digit" else SHAPES[item.value]


def _script(rng: np.random.Generator) -> tuple[list[Actor], list[list[int]], int, list[int]]:
    """Cast of a video, its colours in each frame, who changes, and the frame of each visitor.

    Residents come first and are always there; visitors come last, each in one frame only.
    """
    names = [int(v) for v in rng.permutation(len(SHAPES))]
    residents, visitors = int(rng.integers(3, 5)), int(rng.integers(2, 5))
    cast: list[Actor] = []
    if rng.random() < 0.5:
        cast.append(("digit", int(rng.integers(10)), int(rng.integers(8)), -1))
    first = len(cast)
    for name in names[: residents + visitors]:
        color = int(rng.integers(8))
        dot = int((color + rng.integers(1, 8)) % 8) if rng.random() < 0.2 else -1
        cast.append(("shape", name, color, dot))
    changed = first + int(rng.integers(residents))
    kind, value, color, _ = cast[changed]
    cast[changed] = (kind, value, color, -1)  # a dot could have the new colour
    new, since = int((color + rng.integers(1, 8)) % 8), int(rng.integers(1, 3))
    when = [int(f) for f in rng.permutation(3)[:2]]
    when += [int(rng.integers(3)) for _ in range(visitors - 2)]
    shown = []
    for frame in range(3):
        colors = [actor[2] for actor in cast]
        if frame >= since:
            colors[changed] = new
        for visitor, at in enumerate(when):
            if at != frame:
                colors[first + residents + visitor] = -2
        shown.append(colors)
    return cast, shown, changed, when


def show_video(seed: int, split: Split, index: int) -> Shown:
    """Three frames: which of two visitors comes first, what changed, and colours in a frame."""
    rng = _rng(seed, split, index, "order")
    cast, shown, changed, when = _script(rng)
    scenes = draw_frames(rng, cast, shown, split)
    names = [SHAPES[value] if what == "shape" else what for what, value, _, _ in cast]
    at: list[dict[str, tuple[int, ...]]] = [
        {SHAPES[i.value]: i.patches for i in scene.items if i.kind == "shape"} for scene in scenes
    ]
    found: list[Asked] = []
    guests = names[-len(when) :]
    for i, j in combinations(range(len(when)), 2):
        if when[i] == when[j]:
            continue
        one, two = (i, j) if rng.random() < 0.5 else (j, i)
        sooner = guests[i if when[i] < when[j] else j]
        text = f"which comes first the {guests[one]} or the {guests[two]} ? :"
        seen = tuple(
            tuple(sorted({p for g in (i, j) if when[g] == f for p in at[f][guests[g]]}))
            for f in range(3)
        )
        found.append(Asked("order", text, sooner, seen))
    who = names[changed]
    everywhere = tuple(frame[who] for frame in at)
    found.append(Asked("changed", "which shape changed its color ? :", who, everywhere))
    for frame, colors in enumerate(shown):
        for k, (kind, color) in enumerate(zip((a[0] for a in cast), colors, strict=True)):
            if kind != "shape" or color == -2:
                continue
            form = "last" if k == changed and frame == 2 else "other"
            text = f"what color is the {names[k]} in the {ORDINALS[frame]} picture ? :"
            only = tuple(at[f][names[k]] if f == frame else () for f in range(3))
            found.append(Asked(form, text, COLORS[color], only))
    order = rng.permutation(len(found))
    return Shown(tuple(scenes), FRAMES, tuple(found[i] for i in order))


def converse(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Three questions of different kinds, or none if the scene has none of a chosen kind."""
    kinds = [TURN_KINDS[i] for i in rng.permutation(len(TURN_KINDS))[:TURNS]]
    turns = []
    for kind in kinds:
        if not (found := ask(scene, kind, rng)):
            return []
        turns.append(found)
    return [found[0] for found in turns]


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
        ValueError: `kind` is unknown or `n` is not positive.
    """
    if kind not in EPISODE_KINDS or n < 1:
        raise ValueError(f"need a kind of {EPISODE_KINDS} and n >= 1, got {kind!r} and {n}")
    if kind == "multi_turn":
        return _conversations(n, seed)
    show, forms = _SHOW[kind]
    share = -(-n // len(forms))
    taken: dict[tuple[str, str], int] = {}
    by_form = dict.fromkeys(forms, 0)
    episodes: list[Episode] = []
    for index in count():
        shown = show(seed, "test", index)
        for q in shown.asked:
            if q.form not in forms or by_form[q.form] >= share:
                continue
            if taken.get((q.form, q.answer), 0) >= -(-share // forms[q.form]):
                continue
            taken[q.form, q.answer] = taken.get((q.form, q.answer), 0) + 1
            by_form[q.form] += 1
            images = tuple(scene.pixels for scene in shown.scenes)
            prompt = f"{shown.prefix} {q.text}"
            episodes.append(Episode(kind, images, prompt, q.answer, q.evidence))
            break
        if len(episodes) == n:
            return episodes
    raise AssertionError("unreachable")


def _conversations(n: int, seed: int) -> list[Episode]:
    episodes: list[Episode] = []
    taken: dict[tuple[str, str], int] = {}
    for index in count():
        scene = draw_scene(seed, "test", (1 << 33) + index)
        rng = _rng(seed, "test", index, "multi_turn")
        turns = []
        for kind in (TURN_KINDS[i] for i in rng.permutation(len(TURN_KINDS))[:TURNS]):
            if not (found := ask(scene, kind, rng)):
                break
            turns.append(min(found, key=lambda q: taken.get((q.kind, q.answer), 0)))
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
