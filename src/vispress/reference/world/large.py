"""Large pictures: two or four fields of 96 x 96 pixels, of which a thumbnail shows too little.

After HR-Bench (Wang et al., "Divide, Conquer and Combine", arXiv 2408.15556): fine print, small
objects, and what stands apart. Everything has the size that it has in a scene, so a crop of 96 x 96
pixels shows it as a scene does, and the picture at 96 x 96 shows half of each side.
"""

from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vispress.reference.world.background import background
from vispress.reference.world.digits import Split
from vispress.reference.world.questions import Question, ask
from vispress.reference.world.scenes import (
    GRID,
    IMAGE_SIZE,
    MARGIN,
    Item,
    Scene,
    draw_cast,
    paint,
    place_items,
)
from vispress.reference.world.words import LargeKind, QuestionKind

Fields = tuple[int, int]
"""Rows and columns of fields, which are a picture's crops."""

FIELDS: Final[tuple[Fields, ...]] = ((2, 2), (1, 2), (2, 1))
LARGE_CHANCE: Final[dict[LargeKind, float]] = {
    "fine_print": 1 / 100,
    "small_object": 1 / 8,
    "across_crops": 1 / 4,
}
_ASKED: Final[dict[LargeKind, QuestionKind]] = {
    "fine_print": "reading",
    "small_object": "needle",
    "across_crops": "relation",
}
_SALT: Final = 7


def draw_large(seed: int, split: Split, index: int, fields: Fields) -> Scene:
    """Draw one large picture.

    Args:
        seed: Any non-negative number.
        split: Which handwritten digits are used; also part of the seed.
        index: Number of the picture within the seed and split.
        fields: Rows and columns of fields.

    Returns:
        The picture, (96 * rows, 96 * columns, 3). Places and patches of its items are those in the
        picture at 96 x 96 pixels, whose 12 x 12 patches lie over the whole. It has no labels of
        patches.
    """
    rows, columns = fields
    rng = np.random.default_rng((seed, 0 if split == "train" else 1, index, _SALT))
    cast = draw_cast(rng, 1.0)
    home = rng.integers(rows * columns, size=len(cast))
    ground = background(rng, IMAGE_SIZE * max(fields) + 2 * MARGIN)
    pixels = np.zeros((IMAGE_SIZE * rows, IMAGE_SIZE * columns, 3), dtype=np.uint8)
    items: list[Item] = []
    for field in range(rows * columns):
        row, column = divmod(field, columns)
        top, left = IMAGE_SIZE * row, IMAGE_SIZE * column
        size = IMAGE_SIZE + 2 * MARGIN
        members = [one for one, at in zip(cast, home, strict=True) if at == field]
        part = paint(
            rng,
            place_items(rng, members),
            split,
            ground=ground[top : top + size, left : left + size],
        )
        pixels[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE] = part.pixels
        items += [_moved(item, row, column, fields) for item in part.items]
    none = np.zeros(0, dtype=np.uint8)
    return Scene(pixels, tuple(items), none, none, none, none)


def _moved(item: Item, row: int, column: int, fields: Fields) -> Item:
    """Move an item from its field into the picture."""
    rows, columns = fields

    def seen(patches: tuple[int, ...]) -> tuple[int, ...]:
        at = {(GRID * row + p // GRID, GRID * column + p % GRID) for p in patches}
        return tuple(sorted({y // rows * GRID + x // columns for y, x in at}))

    return replace(
        item,
        x=(IMAGE_SIZE * column + item.x) / columns,
        y=(IMAGE_SIZE * row + item.y) / rows,
        patches=seen(item.patches),
        dot_patches=seen(item.dot_patches),
    )


def crops_of(question: Question, fields: Fields) -> set[int]:
    """Find the crops, numbered row by row, that hold a question's evidence."""
    rows, columns = fields
    places = (divmod(patch, GRID) for patch in question.patches)
    return {y * rows // GRID * columns + x * columns // GRID for y, x in places}


def ask_large(
    scene: Scene, fields: Fields, kind: LargeKind, rng: np.random.Generator
) -> list[Question]:
    """Ask all questions of a kind about a large picture, in random order.

    Args:
        scene: Of `draw_large`.
        fields: Its rows and columns of fields.
        kind: One of `LARGE_KINDS`.
        rng: Chooses between equally good names, and the order.

    Returns:
        Possibly none. What is asked across crops has evidence in more than one of them.
    """
    questions = ask(scene, _ASKED[kind], rng)
    if kind == "across_crops":
        return [q for q in questions if len(crops_of(q, fields)) > 1]
    return questions


def cut(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Cut a picture into its thumbnail and crops, row by row, uint8 (1 + C, 96, 96, 3)."""
    from PIL import Image

    side = IMAGE_SIZE
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    crops = pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    return np.concatenate([np.asarray(image)[None], crops])
