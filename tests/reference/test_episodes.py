"""Episodes: right, balanced, reproducible, and answerable from their evidence only."""

from collections import Counter

import numpy as np
import pytest

from vispress.reference.evaluation.episode_sets import held_out_episodes
from vispress.reference.world.episodes import (
    EPISODE_CHANCE,
    ORDINALS,
    TURN_KINDS,
    converse,
    show_examples,
    show_pair,
)
from vispress.reference.world.scenes import draw_scene
from vispress.reference.world.videos import show_video
from vispress.reference.world.words import (
    COLOR_WORDS,
    COLORS,
    EPISODE_KINDS,
    SHAPES,
    WHAT_WORDS,
    WORD_ID,
)

SHOWS = [show_pair, show_examples, show_video]


def seen(scene, patches):
    """Names and colours that the dense labels give these patches."""
    names = {WHAT_WORDS[scene.what[p]] for p in patches}
    return names | {COLOR_WORDS[scene.color[p]] for p in patches}


def questions(show, form, n=30):
    for index in range(n):
        shown = show(5, "test", index)
        for q in shown.asked:
            if q.form == form:
                yield shown, q


@pytest.mark.parametrize("kind", EPISODE_KINDS)
def test_held_out_episodes_repeat_exactly_and_change_with_the_seed(kind):
    first, again = (held_out_episodes(kind, 6, seed=3) for _ in range(2))
    other = held_out_episodes(kind, 6, seed=4)
    for a, b in zip(first, again, strict=True):
        assert (a.prompt, a.answer_text, a.evidence) == (b.prompt, b.answer_text, b.evidence)
        assert all(np.array_equal(x, y) for x, y in zip(a.images, b.images, strict=True))
    assert [e.prompt for e in first] != [e.prompt for e in other]


@pytest.mark.parametrize("kind", EPISODE_KINDS)
def test_words_are_known_and_every_picture_has_its_mark(kind):
    for e in held_out_episodes(kind, 12):
        turns = ((e.prompt, e.answer), *e.followups)
        for text, answer in turns:
            assert text.endswith(":")
            assert all(word in WORD_ID for word in (*text.split(), answer))
        assert e.prompt.count("<image>") == len(e.images) == len(e.evidence)
        assert any(e.evidence)
        assert all(p == tuple(sorted(set(p))) for p in e.evidence)
        assert all(0 <= cell < 144 for p in e.evidence for cell in p)


@pytest.mark.parametrize(
    ("kind", "most"),
    [("compare", {"first": 10, "second": 10}), ("in_context", {}), ("order", {}), ("change", {})],
)
def test_answers_are_balanced_within_a_form(kind, most):
    answers = Counter(e.answer for e in held_out_episodes(kind, 40))
    ceiling = {"compare": 3, "in_context": 3, "order": 5, "change": 3}[kind]
    assert all(n <= most.get(answer, ceiling) for answer, n in answers.items())
    assert len(answers) >= 7


def test_answers_of_each_turn_kind_are_balanced():
    right = Counter(
        answer
        for e in held_out_episodes("multi_turn", 120)
        for text, answer in ((e.prompt, e.answer), *e.followups)
        if "is there" in text
    )
    assert abs(right["yes"] - right["no"]) <= 2
    assert right["yes"] > 20


def test_training_and_test_never_show_the_same():
    for show in SHOWS:
        train, test = show(0, "train", 4), show(0, "test", 4)
        assert not np.array_equal(train.scenes[0].pixels, test.scenes[0].pixels)


def test_only_one_picture_has_what_is_asked_for():
    checked = Counter()
    for shown, q in questions(show_pair, "which"):
        color, shape = q.text.split()[4:6]
        has = [
            any(
                (COLORS[i.color], SHAPES[i.value]) == (color, shape)
                for i in s.items
                if i.kind == "shape"
            )
            for s in shown.scenes
        ]
        at = ORDINALS.index(q.answer)
        assert has == [at == 0, at == 1]
        assert {color, shape} <= seen(shown.scenes[at], q.evidence[at])
        assert not q.evidence[1 - at]
        checked[q.answer] += 1
    assert min(checked.values()) > 20


def test_the_other_picture_offers_another_color():
    for shown, q in questions(show_pair, "color"):
        words = q.text.split()
        shape, at = words[4], ORDINALS.index(words[7])
        colors = [
            {COLORS[i.color] for i in s.items if i.kind == "shape" and SHAPES[i.value] == shape}
            for s in shown.scenes
        ]
        assert colors[at] == {q.answer}
        assert colors[1 - at]
        assert q.answer not in colors[1 - at]
        assert {shape, q.answer} <= seen(shown.scenes[at], q.evidence[at])


@pytest.mark.parametrize(("form", "other"), [("digit", "shape"), ("shape", "digit")])
def test_without_its_examples_a_color_asks_for_two_things(form, other):
    checked = 0
    for shown, q in questions(show_examples, form):
        color = q.text.split()[0]
        things = {
            kind: [i for i in shown.scenes[2].items if i.kind == kind and COLORS[i.color] == color]
            for kind in ("digit", "shape")
        }
        # the last picture has one of each, so only the examples can say which is meant
        assert {len(found) for found in things.values()} == {1}
        (right,) = things[form]
        assert q.answer == (str(right.value) if form == "digit" else SHAPES[right.value])
        assert q.evidence[2] == right.patches
        assert set(right.patches) != set(things[other][0].patches)
        words = shown.prefix.split()
        for example, scene in enumerate(shown.scenes[:2]):
            asked, answer = words[1 + 4 * example], words[3 + 4 * example]
            assert answer.isdigit() == (form == "digit")
            assert {asked, answer} <= seen(scene, q.evidence[example])
        checked += 1
    assert checked > 30


def test_of_two_visitors_the_sooner_comes_first():
    for shown, q in questions(show_video, "order"):
        names = [word for word in q.text.split() if word in SHAPES]
        at = {
            name: [
                f
                for f, scene in enumerate(shown.scenes)
                if any(i.kind == "shape" and SHAPES[i.value] == name for i in scene.items)
            ]
            for name in names
        }
        assert all(len(frames) == 1 for frames in at.values())
        assert q.answer == min(names, key=lambda name: at[name][0])
        assert at[names[0]] != at[names[1]]
        for name in names:
            (frame,) = at[name]
            assert name in seen(shown.scenes[frame], q.evidence[frame])


def test_a_visitor_is_in_the_picture_that_is_named():
    for shown, q in questions(show_video, "visit"):
        color, shape = q.text.split()[4:6]
        has = [
            any(
                (i.kind, COLORS[i.color], SHAPES[i.value]) == ("shape", color, shape) for i in items
            )
            for items in ([i for i in s.items if i.kind == "shape"] for s in shown.scenes)
        ]
        assert [ORDINALS[at] for at, there in enumerate(has) if there] == [q.answer]


def test_exactly_one_shape_changes_and_stays_changed():
    for shown, q in questions(show_video, "changed"):
        colors: dict[str, list[str]] = {}
        for scene in shown.scenes:
            for item in scene.items:
                if item.kind == "shape":
                    colors.setdefault(SHAPES[item.value], []).append(COLORS[item.color])
        assert [name for name, found in colors.items() if len(set(found)) == 2] == [q.answer]
        assert len(colors[q.answer]) == 3
        for scene, patches, color in zip(shown.scenes, q.evidence, colors[q.answer], strict=True):
            assert {q.answer, color} <= seen(scene, patches)
        (last,) = [other for other in shown.asked if other.form == "last"]
        assert f"the {q.answer} in the last picture" in last.text
        assert last.answer == colors[q.answer][2] != colors[q.answer][0]


def test_what_stays_looks_the_same_in_every_frame():
    shown = show_video(5, "test", 0)
    still = [{i for i in scene.items if i.kind == "digit"} for scene in shown.scenes]
    assert still[0] == still[1] == still[2]
    for other in shown.scenes[1:]:
        patches = other.pixels.reshape(12, 8, 12, 8, 3).swapaxes(1, 2).reshape(144, -1)
        first = shown.scenes[0].pixels.reshape(12, 8, 12, 8, 3).swapaxes(1, 2).reshape(144, -1)
        # apart from the noise, most of the picture is as it was
        apart = np.abs(patches.astype(int) - first.astype(int)).max(1)
        assert (apart <= 18).mean() > 0.6


def test_turns_are_of_different_kinds():
    scene = draw_scene(5, "test", 1)
    turns = [converse(scene, np.random.default_rng(i)) for i in range(20)]
    found = [t for t in turns if t]
    assert found
    assert all(len({q.kind for q in t}) == 3 for t in found)
    assert all(q.kind in TURN_KINDS and " " not in q.answer for t in found for q in t)


def test_chance_is_what_words_alone_earn():
    episodes = held_out_episodes("order", 80)
    first_named = sum(e.answer == e.prompt.split(" the ")[1].split()[0] for e in episodes)
    assert abs(first_named / 80 - EPISODE_CHANCE["order"]) < 0.12
    assert 0 < EPISODE_CHANCE["multi_turn"] < 0.02


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="compare"):
        held_out_episodes("comparison", 3)
    with pytest.raises(ValueError, match="n must be an integer >= 1"):
        held_out_episodes("order", 0)
