"""Questions about two pictures, with examples in the prompt, or in conversation.

What is shown is a pure function of (seed, split, index), like a scene. Held-out episodes and
training rows come from the same functions: some pictures, and every question that can be asked.
"""

from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import Final

import numpy as np

from vispress.reference.world.digits import Split
from vispress.reference.world.questions import CHANCE, Question, ask
from vispress.reference.world.scenes import Actor, Item, Scene, draw_scene, paint, place_items
from vispress.reference.world.words import (
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


def episode_rng(seed: int, split: Split, index: int, kind: EpisodeKind) -> np.random.Generator:
    """Make the generator of one episode's choices."""
    part = 0 if split == "train" else 1
    return np.random.default_rng((seed, 10 + EPISODE_KINDS.index(kind), part, index))


def _shapes(scene: Scene) -> list[Item]:
    return [item for item in scene.items if item.kind == "shape"]


def show_pair(seed: int, split: Split, index: int) -> Shown:
    """Draw two scenes: ask in which of them something is, and what colour a shape has in one."""
    # two neighbours, far away from the scenes of other stages
    scenes = tuple(draw_scene(seed, split, (1 << 33) + 2 * index + i) for i in range(2))
    asked: list[Asked] = []
    pairs = [{(s.color, s.value) for s in _shapes(scene)} for scene in scenes]
    for at, scene in enumerate(scenes):
        other = _shapes(scenes[1 - at])
        shapes = _shapes(scene)
        for color, value in sorted(pairs[at] - pairs[1 - at]):
            same = [s for s in shapes if (s.color, s.value) == (color, value)]
            text = f"which picture has a {COLORS[color]} {SHAPES[value]} ? :"
            asked.append(Asked("which", text, ORDINALS[at], _beside(at, _merge(same))))
        for item in shapes:
            # the other picture must offer another answer
            if (
                sum(s.value == item.value for s in shapes) == 1
                and any(s.value == item.value for s in other)
                and all(s.color != item.color for s in other if s.value == item.value)
            ):
                text = f"what color is the {SHAPES[item.value]} in the {ORDINALS[at]} picture ? :"
                asked.append(Asked("color", text, COLORS[item.color], _beside(at, item.patches)))
    order = episode_rng(seed, split, index, "compare").permutation(len(asked))
    return Shown(scenes, PAIR, tuple(asked[i] for i in order))


def _beside(at: int, patches: tuple[int, ...]) -> Evidence:
    return (patches, ()) if at == 0 else ((), patches)


def _merge(items: list[Item]) -> tuple[int, ...]:
    return tuple(sorted({patch for item in items for patch in item.patches}))


def show_examples(seed: int, split: Split, index: int) -> Shown:
    """Draw two examples of whether a colour asks for the digit or the shape; ask four colours.

    In every picture four colours each have one digit and one shape; even numbers ask for digits.
    """
    rng = episode_rng(seed, split, index, "in_context")
    form = "digit" if index % 2 == 0 else "shape"
    scenes, words, evidence = [], [], []
    for _ in range(3):
        colors = rng.permutation(len(COLORS))
        cast: list[Actor] = [("digit", int(rng.integers(10)), int(c), -1) for c in colors[:4]]
        for color in (*colors[:4], *rng.choice(colors[4:], rng.integers(1, 4))):
            dot = int((color + rng.integers(1, 8)) % 8) if rng.random() < 0.3 else -1
            cast.append(("shape", int(rng.integers(8)), int(color), dot))
        scene = paint(rng, place_items(rng, cast), split)
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


def converse(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Ask three questions of different kinds; none if the scene has none of a chosen kind."""
    kinds = [TURN_KINDS[i] for i in rng.permutation(len(TURN_KINDS))[:TURNS]]
    turns = []
    for kind in kinds:
        if not (questions := ask(scene, kind, rng)):
            return []
        turns.append(questions)
    return [questions[0] for questions in turns]
