"""Questions about a scene: nine kinds that need different visual tokens, one right answer each."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from vispress.reference.world.scenes import IMAGE_SIZE, Item, Scene
from vispress.reference.world.words import (
    COLORS,
    COLUMNS,
    NUMBERS,
    PLURALS,
    ROWS,
    SHAPES,
    QuestionKind,
)

# accuracy of the best guess from the question alone, answers being balanced
CHANCE: Final[dict[QuestionKind, float]] = {
    "attribute": 1 / 8,
    "place": 1 / 8,
    "existence": 1 / 2,
    "needle": 1 / 8,
    "digit": 1 / 10,
    "reading": 1 / 100,
    "where": 1 / 9,
    "relation": 1 / 4,
    "count": 1 / 5,
}

_MAX_COUNT: Final = 4
_CLEAR: Final = 2.5  # pixels a centre must be away from a border between thirds


@dataclass(frozen=True, slots=True)
class Question:
    """A question with one right answer.

    Args:
        kind: One of `KINDS`.
        text: Words separated by spaces, ending in `? :`.
        answer: One or two words.
        patches: Indices in `[0, 144)` of the visual tokens that hold the evidence, ascending.
            Empty only for counts of zero.
    """

    kind: QuestionKind
    text: str
    answer: str
    patches: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The text that the processor is given."""
        return f"<image> {self.text}"


def ask(scene: Scene, kind: QuestionKind, rng: np.random.Generator) -> list[Question]:
    """Ask all questions of a kind about a scene, in random order.

    Args:
        scene: The scene.
        kind: One of `KINDS`.
        rng: Chooses between equally good names, and the order.

    Returns:
        Possibly none: a scene without a sign has no reading question.
    """
    questions = _ASK[kind](scene, rng)
    return [questions[i] for i in rng.permutation(len(questions))]


def mixture(
    scene: Scene, rng: np.random.Generator, quota: dict[QuestionKind, int]
) -> list[Question]:
    """Draw a shuffled training mixture.

    Args:
        scene: The scene.
        rng: Source of all choices.
        quota: At most this many of each kind; answers are balanced within a kind.

    Returns:
        The questions, shuffled.
    """
    chosen: list[Question] = []
    for kind, most in quota.items():
        chosen += balance(ask(scene, kind, rng), most)
    return [chosen[i] for i in rng.permutation(len(chosen))]


def balance(questions: Iterable[Question], most: int) -> list[Question]:
    """Take at most `most` questions, answers in turn; within an answer the order is kept."""
    by_answer: dict[str, list[Question]] = {}
    for question in questions:
        by_answer.setdefault(question.answer, []).append(question)
    chosen: list[Question] = []
    while by_answer and len(chosen) < most:
        for answer in list(by_answer):
            chosen.append(by_answer[answer].pop())
            if not by_answer[answer]:
                del by_answer[answer]
    return chosen[:most]


def _shapes(scene: Scene) -> list[Item]:
    return [item for item in scene.items if item.kind == "shape"]


def _names(item: Item, shapes: list[Item]) -> list[str]:
    """List names that fit this shape and no other."""
    color, shape = COLORS[item.color], SHAPES[item.value]
    names = []
    if sum(s.value == item.value for s in shapes) == 1:
        names.append(shape)
    if sum(s.color == item.color for s in shapes) == 1:
        names.append(f"{color} shape")
    if sum((s.value, s.color) == (item.value, item.color) for s in shapes) == 1:
        # the full name fits most often, so it should be met most often
        names += [f"{color} {shape}"] * 2
    return names


def _named(scene: Scene, rng: np.random.Generator) -> list[tuple[str, Item]]:
    """List every nameable shape with one of its names."""
    shapes = _shapes(scene)
    pairs = []
    for item in shapes:
        if names := _names(item, shapes):
            pairs.append((names[rng.integers(len(names))], item))
    return pairs


def _merge(items: Iterable[Item]) -> tuple[int, ...]:
    return tuple(sorted({patch for item in items for patch in item.patches}))


def _attribute(scene: Scene, _: np.random.Generator) -> list[Question]:
    shapes = _shapes(scene)
    questions = []
    for item in shapes:
        color, shape = COLORS[item.color], SHAPES[item.value]
        if sum(s.value == item.value for s in shapes) == 1:
            text = f"what color is the {shape} ? :"
            questions.append(Question("attribute", text, color, item.patches))
        if sum(s.color == item.color for s in shapes) == 1:
            text = f"which shape is {color} ? :"
            questions.append(Question("attribute", text, shape, item.patches))
    return questions


def _place(scene: Scene, _: np.random.Generator) -> list[Question]:
    shapes = _shapes(scene)
    third = IMAGE_SIZE / 3
    questions = []
    for row, row_name in enumerate(ROWS):
        for column, column_name in enumerate(COLUMNS):
            # distance of each centre from the middle of this ninth
            far = [
                max(abs(s.x - third * (column + 0.5)), abs(s.y - third * (row + 0.5)))
                for s in shapes
            ]
            near = [i for i, d in enumerate(far) if d < third / 2 + _CLEAR]
            if len(near) == 1 and far[near[0]] < third / 2 - _CLEAR:
                item = shapes[near[0]]
                text = f"what shape is at the {row_name} {column_name} ? :"
                questions.append(Question("place", text, SHAPES[item.value], item.patches))
    return questions


def _existence(scene: Scene, rng: np.random.Generator) -> list[Question]:
    shapes = _shapes(scene)
    pairs = {(s.color, s.value) for s in shapes}
    colors, values = {c for c, _ in pairs}, {v for _, v in pairs}
    questions = []
    for color in sorted(colors):
        for value in sorted(values):
            text = f"is there a {COLORS[color]} {SHAPES[value]} ? :"
            if (color, value) in pairs:
                same = [s for s in shapes if (s.color, s.value) == (color, value)]
                questions.append(Question("existence", text, "yes", _merge(same)))
            else:
                # a hard negative: both halves occur, not together
                half = [s for s in shapes if s.color == color or s.value == value]
                questions.append(Question("existence", text, "no", _merge(half)))
    yes = [q for q in questions if q.answer == "yes"]
    no = [q for q in questions if q.answer == "no"]
    most = min(len(yes), len(no))
    keep = [pool[i] for pool in (yes, no) for i in rng.permutation(len(pool))[:most]]
    return keep


def _needle(scene: Scene, rng: np.random.Generator) -> list[Question]:
    return [
        Question(
            "needle",
            f"what color is the dot in the {name} ? :",
            COLORS[item.dot],
            tuple(sorted({*item.patches, *item.dot_patches})),
        )
        for name, item in _named(scene, rng)
        if item.dot >= 0
    ]


def _digit(scene: Scene, _: np.random.Generator) -> list[Question]:
    return [
        Question("digit", f"which digit is {COLORS[i.color]} ? :", str(i.value), i.patches)
        for i in scene.items
        if i.kind == "digit"
    ]


def _reading(scene: Scene, _: np.random.Generator) -> list[Question]:
    return [
        Question(
            "reading",
            "what number is on the sign ? :",
            f"{item.value // 10} {item.value % 10}",
            item.patches,
        )
        for item in scene.items
        if item.kind == "sign"
    ]


def _where(scene: Scene, rng: np.random.Generator) -> list[Question]:
    third = IMAGE_SIZE / 3
    questions = []
    for name, item in _named(scene, rng):
        off = min(abs(at - border) for at in (item.x, item.y) for border in (third, 2 * third))
        if off >= _CLEAR:
            answer = f"{ROWS[item.row]} {COLUMNS[item.column]}"
            questions.append(Question("where", f"where is the {name} ? :", answer, item.patches))
    return questions


def _relation(scene: Scene, rng: np.random.Generator) -> list[Question]:
    named = _named(scene, rng)
    questions = []
    for name, item in named:
        for other_name, other in named:
            dx, dy = item.x - other.x, item.y - other.y
            # one axis must clearly win
            if item is other or max(abs(dx), abs(dy)) < 1.6 * min(abs(dx), abs(dy)) + 4:
                continue
            if abs(dx) > abs(dy):
                answer = "left" if dx < 0 else "right"
            else:
                answer = "above" if dy < 0 else "below"
            text = f"which side of the {other_name} is the {name} ? :"
            questions.append(Question("relation", text, answer, _merge((item, other))))
    return questions


def _count(scene: Scene, rng: np.random.Generator) -> list[Question]:
    shapes = _shapes(scene)
    colors, values = Counter(s.color for s in shapes), Counter(s.value for s in shapes)
    questions = []
    for index in range(len(COLORS)):
        groups = (
            (colors[index], f"{COLORS[index]} shapes", [s for s in shapes if s.color == index]),
            (values[index], PLURALS[index], [s for s in shapes if s.value == index]),
        )
        for number, name, items in groups:
            if number <= _MAX_COUNT:
                text = f"how many {name} ? :"
                questions.append(Question("count", text, NUMBERS[number], _merge(items)))
    # nothing is the commonest number of all: one question about it is enough
    zero = [q for q in questions if not q.patches]
    spare = set(rng.permutation(len(zero))[1:].tolist())
    skip = {zero[i].text for i in spare}
    return [q for q in questions if q.text not in skip]


_ASK: Final[dict[QuestionKind, Callable[[Scene, np.random.Generator], list[Question]]]] = {
    "attribute": _attribute,
    "place": _place,
    "existence": _existence,
    "needle": _needle,
    "digit": _digit,
    "reading": _reading,
    "where": _where,
    "relation": _relation,
    "count": _count,
}
