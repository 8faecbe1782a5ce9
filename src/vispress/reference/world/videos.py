"""Short videos: three frames of one scene in which things come, go and change their colour."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final

import numpy as np

from vispress.reference.world.digits import Split
from vispress.reference.world.episodes import FRAMES, ORDINALS, Asked, Shown, episode_rng
from vispress.reference.world.scenes import Actor, Scene, paint, place_items
from vispress.reference.world.words import COLORS, SHAPES

GONE: Final = -2
"""The color of what is not there."""


@dataclass(frozen=True, slots=True)
class Cast:
    """Who is in a video: residents, which are always there, then visitors.

    Args:
        actors: A digit perhaps, and shapes of which no two are alike.
        guests: Number of the first visitor.
        changed: Number of the resident that changes its colour.
        new: Its new colour.
        since: Frame, or step, from which it has it.
    """

    actors: list[Actor]
    guests: int
    changed: int
    new: int
    since: int

    def colors(self, at: int) -> list[int]:
        """List the colours of all at a frame or step, as if all were there."""
        colors = [actor[2] for actor in self.actors]
        if at >= self.since:
            colors[self.changed] = self.new
        return colors


def draw_cast(rng: np.random.Generator, steps: int) -> Cast:
    """Draw who is there in a video of so many frames or steps."""
    names = [int(v) for v in rng.permutation(len(SHAPES))]
    residents, visitors = int(rng.integers(3, 5)), int(rng.integers(2, 5))
    actors: list[Actor] = []
    if rng.random() < 0.5:
        actors.append(("digit", int(rng.integers(10)), int(rng.integers(8)), -1))
    first = len(actors)
    for name in names[: residents + visitors]:
        color = int(rng.integers(8))
        dot = int((color + rng.integers(1, 8)) % 8) if rng.random() < 0.2 else -1
        actors.append(("shape", name, color, dot))
    changed = first + int(rng.integers(residents))
    kind, value, color, _ = actors[changed]
    actors[changed] = (kind, value, color, -1)  # a dot could have the new colour
    new, since = int((color + rng.integers(1, 8)) % 8), int(rng.integers(1, steps))
    return Cast(actors, first + residents, changed, new, since)


def draw_frames(
    rng: np.random.Generator, cast: Sequence[Actor], shown: Sequence[Sequence[int]], split: Split
) -> list[Scene]:
    """Draw a short video of things that appear, vanish or change colour, but do not move.

    Args:
        rng: Source of places, background and handwriting.
        cast: At most 16 things. Those shown in every frame come first, so that their handwriting
            and the background stay the same in all frames.
        shown: For each frame the color of each thing as it is there: an index into `COLORS`, -1
            for a sign, -2 for a thing that is not there.
        split: Which handwritten digits are used.

    Returns:
        A scene a frame; its items are the things that are there, in the order of `cast`.
    """
    placed = place_items(rng, cast, in_order=True)
    key = int(rng.integers(1 << 62))
    return [
        paint(
            np.random.default_rng(key),
            [replace(i, color=c) for i, c in zip(placed, colors, strict=True) if c != GONE],
            split,
        )
        for colors in shown
    ]


def _script(rng: np.random.Generator) -> tuple[list[Actor], list[list[int]], int, list[int]]:
    """Write a video's script: cast, colours in each frame, who changes, each visitor's frame.

    Residents come first and are always there; visitors come last, each in one frame only.
    """
    cast = draw_cast(rng, 3)
    visitors = len(cast.actors) - cast.guests
    when = [int(f) for f in rng.permutation(3)[:2]]
    when += [int(rng.integers(3)) for _ in range(visitors - 2)]
    shown = []
    for frame in range(3):
        colors = cast.colors(frame)
        for visitor, at in enumerate(when):
            if at != frame:
                colors[cast.guests + visitor] = GONE
        shown.append(colors)
    return cast.actors, shown, cast.changed, when


def show_video(seed: int, split: Split, index: int) -> Shown:
    """Draw three frames: ask which visitor comes first, what changed, and colours in a frame."""
    rng = episode_rng(seed, split, index, "order")
    cast, shown, changed, when = _script(rng)
    scenes = draw_frames(rng, cast, shown, split)
    names = [SHAPES[value] if what == "shape" else what for what, value, _, _ in cast]
    at: list[dict[str, tuple[int, ...]]] = [
        {SHAPES[i.value]: i.patches for i in scene.items if i.kind == "shape"} for scene in scenes
    ]
    questions: list[Asked] = []
    guests = names[-len(when) :]
    for i, j in combinations(range(len(when)), 2):
        if when[i] == when[j]:
            continue
        sooner = guests[i if when[i] < when[j] else j]
        seen = tuple(
            tuple(sorted({p for g in (i, j) if when[g] == f for p in at[f][guests[g]]}))
            for f in range(3)
        )
        for first, second in ((i, j), (j, i)):
            text = f"which comes first the {guests[first]} or the {guests[second]} ? :"
            questions.append(Asked("order", text, sooner, seen))
    for guest, frame in zip(range(-len(when), 0), when, strict=True):
        text = f"which picture has a {COLORS[cast[guest][2]]} {names[guest]} ? :"
        only = tuple(at[f][names[guest]] if f == frame else () for f in range(3))
        questions.append(Asked("visit", text, ORDINALS[frame], only))
    who = names[changed]
    everywhere = tuple(frame[who] for frame in at)
    questions.append(Asked("changed", "which shape changed its color ? :", who, everywhere))
    for frame, colors in enumerate(shown):
        for k, (kind, color) in enumerate(zip((a[0] for a in cast), colors, strict=True)):
            if kind != "shape" or color == GONE:
                continue
            form = "last" if k == changed and frame == 2 else "other"
            text = f"what color is the {names[k]} in the {ORDINALS[frame]} picture ? :"
            only = tuple(at[f][names[k]] if f == frame else () for f in range(3))
            questions.append(Asked(form, text, COLORS[color], only))
    order = rng.permutation(len(questions))
    return Shown(tuple(scenes), FRAMES, tuple(questions[i] for i in order))
