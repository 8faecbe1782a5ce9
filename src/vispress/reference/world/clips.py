"""Clips: twelve frames of one scene that mostly stays as it is, and questions about what happens.

A clip is a pure function of (seed, split, index), like a scene. The camera does not move, and
frames differ in a little noise; things come, go or change their colour between steps of two frames,
which a model of the Qwen2.5-VL architecture joins into one temporal patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vispress.reference.world.digits import Split
from vispress.reference.world.episodes import Asked
from vispress.reference.world.scenes import NUM_PATCHES, Actor, Item, Scene, paint, place_items
from vispress.reference.world.videos import GONE, draw_cast
from vispress.reference.world.words import COLORS, SHAPES, ClipKind

STEPS: Final = 6
FRAMES: Final = 2 * STEPS

# accuracy of the best guess from the words alone, answers being balanced
CLIP_CHANCE: Final[dict[ClipKind, float]] = {"clip_order": 1 / 2, "clip_change": 1 / 8}

_FLICKER: Final = 3  # most that a frame's own noise adds to a pixel


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip and every question asked of it.

    Args:
        frames: uint8, shape (12, 96, 96, 3).
        asked: The questions; the evidence of each is that of one video: `144 * f + p` for patch
            `p` of frame `f`, the fewest that tell the answer, ascending.
    """

    frames: NDArray[np.uint8]
    asked: tuple[Asked, ...]


@dataclass(frozen=True, slots=True)
class _Script:
    """Script of a clip: who is there in which colour at every step.

    Args:
        cast: Residents, which are always there, then visitors, of which at most one is there.
        shown: For each step the color of each member; -2 while it is away.
        changed: Number of the resident that changes its colour.
        since: Step from which it has the new one.
        visits: First step of each visitor, ascending.
    """

    cast: list[Actor]
    shown: list[list[int]]
    changed: int
    since: int
    visits: list[int]

    def name(self, member: int) -> str:
        """Name a shape; no two of a clip are alike."""
        return SHAPES[self.cast[member][1]]


def _script(rng: np.random.Generator) -> _Script:
    cast = draw_cast(rng, STEPS)
    visitors = len(cast.actors) - cast.guests
    visits = sorted(int(s) for s in rng.permutation(STEPS)[:visitors])
    ends = [
        min(b, a + int(rng.integers(1, 3)))
        for a, b in zip(visits, [*visits[1:], STEPS], strict=True)
    ]
    shown = []
    for step in range(STEPS):
        colors = cast.colors(step)
        for visitor, (begin, end) in enumerate(zip(visits, ends, strict=True)):
            if not begin <= step < end:
                colors[cast.guests + visitor] = GONE
        shown.append(colors)
    return _Script(cast.actors, shown, cast.changed, cast.since, visits)


def _draw(rng: np.random.Generator, script: _Script, split: Split) -> list[Scene]:
    """Draw a scene a step; steps that show the same are drawn once."""
    placed = place_items(rng, script.cast, in_order=True)
    look, grain = int(rng.integers(1 << 62)), int(rng.integers(1 << 62))
    drawn: dict[tuple[int, ...], Scene] = {}
    for colors in script.shown:
        if (key := tuple(colors)) not in drawn:
            there = zip(placed, colors, strict=True)
            items: list[Item] = [replace(i, color=c) for i, c in there if c != GONE]
            noise = np.random.default_rng(grain)
            drawn[key] = paint(np.random.default_rng(look), items, split, noise=noise)
    return [drawn[tuple(colors)] for colors in script.shown]


def _film(rng: np.random.Generator, scenes: Sequence[Scene]) -> NDArray[np.uint8]:
    """Film two frames a scene, each with a little noise of its own: (12, 96, 96, 3)."""
    still = np.stack([scene.pixels for scene in scenes]).repeat(2, axis=0).astype(np.int16)
    noise = rng.integers(-_FLICKER, _FLICKER + 1, still.shape, dtype=np.int8)
    film: NDArray[np.uint8] = np.clip(still + noise, 0, 255).astype(np.uint8)
    return film


def show_clip(seed: int, split: Split, index: int) -> Clip:
    """Draw a clip and ask which visitor comes first, what changed its colour, and easier things."""
    rng = np.random.default_rng((seed, 20, 0 if split == "train" else 1, index))
    script = _script(rng)
    scenes = _draw(rng, script, split)
    at = [{SHAPES[i.value]: i.patches for i in s.items if i.kind == "shape"} for s in scenes]

    def seen(*where: tuple[int, str]) -> tuple[tuple[int, ...]]:
        cells = {2 * step * NUM_PATCHES + p for step, name in where for p in at[step][name]}
        return (tuple(sorted(cells)),)

    questions: list[Asked] = []
    first = len(script.cast) - len(script.visits)
    guests = [script.name(first + i) for i in range(len(script.visits))]
    for i, j in combinations(range(len(guests)), 2):
        where = seen((script.visits[i], guests[i]), (script.visits[j], guests[j]))
        for left, right in ((i, j), (j, i)):
            pair = f"the {guests[left]} or the {guests[right]} ? :"
            questions.append(Asked("order", f"which comes first {pair}", guests[i], where))
            questions.append(Asked("late", f"which comes last {pair}", guests[j], where))
    for guest, step in enumerate(script.visits):
        color = COLORS[script.cast[first + guest][2]]
        text = f"what color is the {guests[guest]} ? :"
        questions.append(Asked("visit", text, color, seen((step, guests[guest]))))
    who, since = script.name(script.changed), script.since
    both = seen((since - 1, who), (since, who))
    questions.append(Asked("changed", "which shape changed its color ? :", who, both))
    for member, actor in enumerate(script.cast[:first]):
        if actor[0] != "shape":
            continue
        for word, step in (("first", 0), ("last", STEPS - 1)):
            text = f"what color is the {script.name(member)} in the {word} picture ? :"
            form = word if member == script.changed else "other"
            shown = since if form == "last" else step  # the earliest step that tells
            answer = COLORS[script.shown[step][member]]
            questions.append(Asked(form, text, answer, seen((shown, script.name(member)))))
    asked = tuple(questions[i] for i in rng.permutation(len(questions)))
    return Clip(_film(rng, scenes), asked)
