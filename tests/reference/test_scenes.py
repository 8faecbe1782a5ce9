"""Scenes: deterministic, without overlap, with labels that match what was drawn."""

import numpy as np
import pytest

from vispress.reference.world.digits import handwritten
from vispress.reference.world.scenes import NUM_PATCHES, draw_scene
from vispress.reference.world.words import COLOR_WORDS, COLORS, DOT_WORDS, SHAPES, WHAT_WORDS

SCENES = [draw_scene(7, "test", i) for i in range(12)]


def test_a_scene_is_a_function_of_seed_split_and_index():
    again = draw_scene(7, "test", 3)
    assert np.array_equal(again.pixels, SCENES[3].pixels)
    assert again.items == SCENES[3].items
    for other in (draw_scene(8, "test", 3), draw_scene(7, "train", 3), draw_scene(7, "test", 4)):
        assert not np.array_equal(other.pixels, SCENES[3].pixels)


def test_handwritten_digits_of_the_two_splits_are_disjoint():
    train = {image.tobytes() for group in handwritten("train") for image in group}
    test = [image.tobytes() for group in handwritten("test") for image in group]
    assert len(test) == 450
    assert sum(map(len, handwritten("train"))) == 1347
    assert not train & set(test)
    assert all(handwritten("test"))


@pytest.mark.parametrize("scene", SCENES[:6], ids=range(6))
def test_items_do_not_overlap_and_stay_inside(scene):
    for i, a in enumerate(scene.items):
        assert 9 < a.x < 87
        assert 9 < a.y < 87
        for b in scene.items[:i]:
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > 20


@pytest.mark.parametrize("scene", SCENES, ids=range(12))
def test_dense_labels_name_every_item_at_its_patches(scene):
    assert scene.pixels.shape == (96, 96, 3)
    assert scene.center.sum() == len(scene.items)
    for item in scene.items:
        assert item.patches == tuple(sorted(set(item.patches)))
        assert all(0 <= p < NUM_PATCHES for p in (*item.patches, *item.dot_patches))
        what = {WHAT_WORDS[scene.what[p]] for p in item.patches}
        if item.kind == "sign":
            assert set(f"{item.value:02d}") <= what
            continue
        assert (SHAPES[item.value] if item.kind == "shape" else str(item.value)) in what
        assert COLORS[item.color] in {COLOR_WORDS[scene.color[p]] for p in item.patches}
        if item.dot >= 0:
            assert item.dot != item.color
            assert COLORS[item.dot] in {DOT_WORDS[scene.dot[p]] for p in item.dot_patches}


def test_a_shape_is_drawn_in_its_color():
    scenes = (draw_scene(7, "test", i) for i in range(60))
    solid = {SHAPES.index("circle"), SHAPES.index("square"), SHAPES.index("diamond")}
    reds = [
        scene.pixels[round(item.y), round(item.x)].astype(int)
        for scene in scenes
        for item in scene.items
        if item.kind == "shape"
        and item.value in solid
        and item.dot < 0
        and COLORS[item.color] == "red"
    ]
    assert len(reds) > 3
    assert all(red - max(green, blue) > 60 for red, green, blue in reds)
