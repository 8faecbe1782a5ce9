"""Scenes: 96 x 96 pictures of coloured shapes, handwritten digits and a sign, with ground truth.

A scene is a pure function of (seed, split, index): the same three give the same pixels anywhere.
Objects stand in rows (or columns) without overlap; places within a row are continuous.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from vispress.reference.world.background import background
from vispress.reference.world.digits import Alpha, Split, handwritten, printed, warp
from vispress.reference.world.masks import VARIANTS, WINDOW, shape_masks
from vispress.reference.world.words import COLORS, SHAPES

IMAGE_SIZE: Final = 96
PATCH_SIZE: Final = 8
GRID: Final = IMAGE_SIZE // PATCH_SIZE
NUM_PATCHES: Final = GRID * GRID

_BOX: Final = 22  # side of the square that holds one object
MARGIN: Final = 16  # canvas border, so that masks never need clipping

_RGB: Final = np.array(
    [
        (215, 35, 40),
        (35, 165, 60),
        (45, 75, 225),
        (240, 220, 45),
        (150, 45, 190),
        (245, 135, 25),
        (60, 215, 225),
        (245, 245, 245),
    ],
    dtype=np.float32,
)

Kind = Literal["shape", "digit", "sign"]
Actor = tuple[Kind, int, int, int]
"""A thing to draw: kind, value, color, dot; see `Item`."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing in a scene.

    Args:
        kind: `"shape"`, `"digit"` (handwritten) or `"sign"` (two printed digits).
        value: Index into `SHAPES`, the digit, or the two-digit number `0..99`.
        color: Index into `COLORS`; -1 for a sign.
        dot: Index into `COLORS` of the small dot inside a shape; -1 for none.
        x: Horizontal centre in pixels.
        y: Vertical centre in pixels.
        patches: Raster indices in `[0, 144)` of the visual tokens that show it, ascending.
        dot_patches: Likewise for its dot; empty without one.
    """

    kind: Kind
    value: int
    color: int
    dot: int
    x: float
    y: float
    patches: tuple[int, ...] = ()
    dot_patches: tuple[int, ...] = ()

    @property
    def row(self) -> int:
        """Third of the picture from the top, `0..2`."""
        return min(2, int(self.y * 3 / IMAGE_SIZE))

    @property
    def column(self) -> int:
        """Third of the picture from the left, `0..2`."""
        return min(2, int(self.x * 3 / IMAGE_SIZE))


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture and everything that is true about it.

    Args:
        pixels: uint8, shape (96, 96, 3).
        items: What was drawn, in drawing order.
        what: Index into `WHAT_WORDS` a patch, uint8, shape (144,).
        color: Index into `COLOR_WORDS` a patch, uint8, shape (144,).
        dot: Index into `DOT_WORDS` a patch, uint8, shape (144,).
        center: 1 where a patch holds the centre of an item, uint8, shape (144,).
    """

    pixels: NDArray[np.uint8]
    items: tuple[Item, ...]
    what: NDArray[np.uint8]
    color: NDArray[np.uint8]
    dot: NDArray[np.uint8]
    center: NDArray[np.uint8]


def draw_scene(seed: int, split: Split, index: int, *, busy: float = 1.0) -> Scene:
    """Draw one scene.

    Args:
        seed: Any non-negative number.
        split: Which handwritten digits are used; also part of the seed.
        index: Number of the scene within the seed and split.
        busy: In `(0, 1]`; scales the number of shapes (a curriculum starts lower).

    Returns:
        The scene; equal arguments give equal scenes.
    """
    rng = np.random.default_rng((seed, 0 if split == "train" else 1, index))
    return paint(rng, place_items(rng, draw_cast(rng, busy)), split)


def paint(
    rng: np.random.Generator,
    items: Sequence[Item],
    split: Split,
    *,
    noise: np.random.Generator | None = None,
    ground: NDArray[np.float32] | None = None,
) -> Scene:
    """Draw placed items on a fresh background, or on a part of a larger one.

    Args:
        rng: Source of background, handwriting and noise.
        items: What to draw, in order.
        split: Which handwritten digits are used.
        noise: Source of the noise, where it must not depend on what is drawn.
        ground: What to draw on, fp32, shape (128, 128, 3): the picture and `MARGIN` around it.
    """
    canvas = background(rng, IMAGE_SIZE + 2 * MARGIN) if ground is None else ground.copy()
    coverage = np.zeros((len(items), GRID, GRID), dtype=np.float32)
    labels = np.zeros((4, NUM_PATCHES), dtype=np.uint8)
    best = np.zeros(NUM_PATCHES, dtype=np.float32)
    done = []
    for i, item in enumerate(items):
        coverage[i] = _draw(rng, canvas, item, split)
        done.append(_label(item, coverage[i].reshape(-1), labels, best, rng, canvas))
    inner = canvas[MARGIN : MARGIN + IMAGE_SIZE, MARGIN : MARGIN + IMAGE_SIZE]
    grain = (rng if noise is None else noise).integers(-9, 10, inner.shape, dtype=np.int8)
    pixels = np.clip(inner + grain, 0, 255).astype(np.uint8)
    return Scene(pixels, tuple(done), labels[0], labels[1], labels[2], labels[3])


def draw_cast(rng: np.random.Generator, busy: float) -> list[Actor]:
    """Choose what is in the scene: (kind, value, color, dot) each."""
    most = max(3, round(8 * busy))
    n_shapes = int(rng.integers(3, most + 1))
    # a small palette repeats colours and shapes, so that counts vary
    colors = rng.permutation(len(COLORS))[: rng.integers(2, 6)]
    shapes = rng.permutation(len(SHAPES))[: rng.integers(2, 6)]
    cast: list[Actor] = []
    for _ in range(n_shapes):
        color, shape = int(rng.choice(colors)), int(rng.choice(shapes))
        dot = -1
        if rng.random() < 0.5:
            dot = int((color + rng.integers(1, len(COLORS))) % len(COLORS))
        cast.append(("shape", shape, color, dot))
    for color in rng.permutation(len(COLORS))[: rng.integers(1, 4)]:
        cast.append(("digit", int(rng.integers(10)), int(color), -1))
    if rng.random() < 0.8:
        cast.append(("sign", int(rng.integers(100)), -1, -1))
    return cast


def place_items(
    rng: np.random.Generator, cast: Sequence[Actor], *, in_order: bool = False
) -> list[Item]:
    """Give every member of a cast a centre: four lanes, at most four in each, no overlap.

    Args:
        rng: Source of the places.
        cast: At most 16 things; a color or dot of -1 means none.
        in_order: Whether items come in the order of the cast, not lane by lane.
    """
    lanes = rng.permutation(16)[: len(cast)] % 4
    flip = rng.random() < 0.5
    items: list[Item] = []
    order: list[int] = []
    for lane in range(4):
        members = rng.permutation(np.flatnonzero(lanes == lane))
        if not len(members):
            continue
        gaps = rng.dirichlet(np.ones(len(members) + 1)) * (IMAGE_SIZE - _BOX * len(members))
        along = np.cumsum(gaps[:-1]) + _BOX * np.arange(len(members)) + _BOX / 2
        for member, u in zip(members, along, strict=True):
            v = 12 + 24 * lane + float(rng.uniform(-1.5, 1.5))
            x, y = (v, float(u)) if flip else (float(u), v)
            kind, value, color, dot = cast[member]
            items.append(Item(kind, value, color, dot, x, y))
            order.append(int(member))
    return [items[i] for i in np.argsort(order)] if in_order else items


def _window(x: float, y: float) -> tuple[slice, slice]:
    """Find the rows and columns of the canvas under a mask centred at (x, y)."""
    left, top = round(x + MARGIN - WINDOW / 2), round(y + MARGIN - WINDOW / 2)
    return slice(top, top + WINDOW), slice(left, left + WINDOW)


def _paste(
    rng: np.random.Generator,
    canvas: NDArray[np.float32],
    alpha: Alpha,
    where: tuple[slice, slice],
    rgb: NDArray[np.float32],
) -> Alpha:
    """Blend a colour through a mask; returns the covered pixels a patch, shape (12, 12)."""
    jitter = rgb + rng.uniform(-12, 12, 3)
    canvas[where] += alpha[..., None] * (jitter.astype(np.float32) - canvas[where])
    full = np.zeros(canvas.shape[:2], dtype=np.float32)
    full[where] = alpha
    inner = full[MARGIN : MARGIN + IMAGE_SIZE, MARGIN : MARGIN + IMAGE_SIZE]
    covered: Alpha = inner.reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE).sum((1, 3))
    return covered


def _draw(rng: np.random.Generator, canvas: NDArray[np.float32], item: Item, split: Split) -> Alpha:
    """Draw an item without its dot; returns covered pixels a patch, shape (12, 12)."""
    where = _window(item.x, item.y)
    if item.kind == "shape":
        alpha = shape_masks()[item.value, rng.integers(VARIANTS)]
        return _paste(rng, canvas, alpha, where, _RGB[item.color])
    wild = 1.0 if split == "train" else 0.3
    if item.kind == "digit":
        pool = handwritten(split)[item.value]
        alpha = warp(
            pool[rng.integers(len(pool))],
            (WINDOW, WINDOW),
            float(rng.uniform(2.35, 2.75)),
            float(rng.uniform(-0.2, 0.2)) * wild,
            float(rng.uniform(-0.25, 0.25)) * wild,
        )
        return _paste(rng, canvas, alpha, where, _RGB[item.color])
    plate = np.zeros((WINDOW, WINDOW), dtype=np.float32)
    plate[3:-3, 1:-1] = 1.0
    covered = _paste(rng, canvas, plate, where, np.array([235, 232, 215], dtype=np.float32))
    ink = np.zeros((WINDOW, WINDOW), dtype=np.float32)
    for place, digit in enumerate((item.value // 10, item.value % 10)):
        glyph = warp(
            printed()[digit],
            (10, 18),
            float(rng.uniform(1.65, 1.9)),
            float(rng.uniform(-0.06, 0.06)),
            float(rng.uniform(-0.1, 0.2)),
        )
        ink[3:21, 2 + 10 * place : 12 + 10 * place] = glyph
    _paste(rng, canvas, ink, where, np.array([25, 25, 30], dtype=np.float32))
    return covered


def _label(
    item: Item,
    covered: Alpha,
    labels: NDArray[np.uint8],
    best: Alpha,
    rng: np.random.Generator,
    canvas: NDArray[np.float32],
) -> Item:
    """Draw the dot, write the item's dense labels, and return it with its patches filled in."""
    mine = np.flatnonzero(covered >= 6.0)
    if not len(mine):
        mine = np.array([int(covered.argmax())])
    wins = mine[covered[mine] > best[mine]]
    best[wins] = covered[wins]
    if item.kind == "sign":
        first = wins % GRID * PATCH_SIZE + PATCH_SIZE / 2 <= item.x
        tens, units = divmod(item.value, 10)
        labels[0, wins] = 1 + len(SHAPES) + np.where(first, tens, units)
        labels[1, wins] = 1 + len(COLORS) + np.where(first, 0, 1)
    else:
        offset = 1 if item.kind == "shape" else 1 + len(SHAPES)
        labels[0, wins] = offset + item.value
        labels[1, wins] = 1 + item.color
    center = int(item.y // PATCH_SIZE) * GRID + int(item.x // PATCH_SIZE)
    labels[3, center] = 1
    dots: tuple[int, ...] = ()
    if item.dot >= 0:
        axis = np.arange(WINDOW) + 0.5 - WINDOW / 2
        dx, dy = rng.uniform(-1.5, 1.5, 2)
        r = np.hypot((axis - dx)[None, :], (axis - dy)[:, None])
        alpha = np.clip(3.4 - r, 0, 1).astype(np.float32)
        area = _paste(rng, canvas, alpha, _window(item.x, item.y), _RGB[item.dot]).reshape(-1)
        seen = np.flatnonzero(area >= 5.0)
        labels[2, seen] = 1 + item.dot
        dots = tuple(seen.tolist())
    return Item(
        item.kind, item.value, item.color, item.dot, item.x, item.y, tuple(mine.tolist()), dots
    )
