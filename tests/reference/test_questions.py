"""Questions: right, unambiguous, balanced, and with the evidence at hand."""

from collections import Counter

import numpy as np
import pytest

from vispress.reference import KINDS, heldout
from vispress.reference.world.questions import ask
from vispress.reference.world.scenes import Scene, draw_scene
from vispress.reference.world.words import COLORS, NUMBERS, PLURALS, SHAPES, WORD_ID

SCENES = [draw_scene(11, "test", i) for i in range(40)]


def questions(kind):
    rng = np.random.default_rng(0)
    return [(scene, q) for scene in SCENES for q in ask(scene, kind, rng)]


def shapes_called(scene: Scene, name: str):
    """Shapes that a name such as `red ring`, `ring` or `red shape` could mean."""
    words = name.split()
    return [
        item
        for item in scene.items
        if item.kind == "shape"
        and all(w in ("shape", SHAPES[item.value], COLORS[item.color]) for w in words)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_known_and_evidence_is_given(kind):
    found = questions(kind)
    assert len(found) >= 20
    for _, q in found:
        assert q.prompt == f"<image> {q.text}"
        assert q.text.endswith("? :")
        assert all(word in WORD_ID for word in (*q.text.split(), *q.answer.split()))
        assert q.patches == tuple(sorted(set(q.patches)))
        assert q.patches or q.answer == "zero"


@pytest.mark.parametrize("kind", ["needle", "where", "relation"])
def test_a_name_means_exactly_one_shape(kind):
    starts = {
        "needle": "what color is the dot in the ",
        "where": "where is the ",
        "relation": "which side of the ",
    }
    for scene, q in questions(kind):
        rest = q.text.removeprefix(starts[kind]).removesuffix(" ? :")
        for name in rest.split(" is the "):
            assert len(shapes_called(scene, name)) == 1, q


def test_needle_is_the_color_of_the_dot():
    for scene, q in questions("needle"):
        (item,) = shapes_called(scene, q.text.split(" in the ")[1].removesuffix(" ? :"))
        assert q.answer == COLORS[item.dot]
        assert set(item.dot_patches) <= set(q.patches)


def test_relation_is_the_clearly_longer_axis():
    for scene, q in questions("relation"):
        other_name, name = q.text.removesuffix(" ? :")[len("which side of the ") :].split(
            " is the "
        )
        (item,), (other,) = shapes_called(scene, name), shapes_called(scene, other_name)
        dx, dy = item.x - other.x, item.y - other.y
        right = {"left": -dx, "right": dx, "above": -dy, "below": dy}
        assert max(right, key=right.__getitem__) == q.answer


def test_existence_has_hard_negatives_only():
    for scene, q in questions("existence"):
        color, shape = q.text.split()[3:5]
        assert bool(shapes_called(scene, f"{color} {shape}")) == (q.answer == "yes")
        assert shapes_called(scene, color)
        assert shapes_called(scene, shape)


def test_count_counts_shapes():
    for scene, q in questions("count"):
        words = q.text.split()[2:-2]
        name = SHAPES[PLURALS.index(words[0])] if len(words) == 1 else words[0]
        assert q.answer == NUMBERS[len(shapes_called(scene, name))]


def test_held_out_questions_are_balanced_and_reproducible():
    first, again = heldout("count", 20, seed=3), heldout("count", 20, seed=3)
    assert [x[1:] for x in first] == [x[1:] for x in again]
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert [x[1] for x in heldout("count", 20, seed=4)] != [x[1] for x in first]
    assert max(Counter(answer for _, _, answer, _ in first).values()) == 4


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="colour"):
        heldout("colour", 3)
    with pytest.raises(ValueError, match="n must be an integer >= 1"):
        heldout("count", 0)
