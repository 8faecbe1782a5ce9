"""Clips: what is drawn, what is asked, and where the answers are."""

from collections import Counter

import numpy as np
import pytest

from vispress.reference.evaluation.clip_sets import held_out_clips
from vispress.reference.world.clips import CLIP_CHANCE, FRAMES, STEPS, show_clip
from vispress.reference.world.scenes import NUM_PATCHES
from vispress.reference.world.words import CLIP_KINDS, COLORS, SHAPES, WORD_ID


@pytest.fixture(scope="module")
def clips():
    return [show_clip(0, "test", index) for index in range(40)]


def patch(frames, cell):
    """Pixels of a patch that evidence names."""
    frame, place = divmod(cell, NUM_PATCHES)
    row, column = divmod(place, 12)
    return frames[frame, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].astype(int)


def still(frames, cell, other):
    """Whether a patch looks alike in another frame, but for noise."""
    before = patch(frames, other * NUM_PATCHES + cell % NUM_PATCHES)
    return np.abs(patch(frames, cell) - before).max() <= 6


def test_a_clip_is_a_function_of_seed_split_and_index():
    one, again = show_clip(3, "train", 7), show_clip(3, "train", 7)
    assert (one.frames == again.frames).all()
    assert one.asked == again.asked
    others = [(4, "train", 7), (3, "test", 7), (3, "train", 8)]
    assert all((show_clip(*other).frames != one.frames).mean() > 0.5 for other in others)
    assert one.frames.shape == (FRAMES, 96, 96, 3)
    assert one.frames.dtype == np.uint8


def test_frames_of_a_step_and_most_of_a_clip_stay_as_they_are(clips):
    for clip in clips:
        frames = clip.frames.astype(int)
        assert np.abs(frames[::2] - frames[1::2]).max() <= 6
        assert (frames[::2] != frames[1::2]).any()
        moved = np.abs(np.diff(frames[::2], axis=0)).max(-1) > 6
        assert 0 < moved.mean() < 0.06
        # something happens at some step
        assert moved.any((1, 2)).sum() >= 2


def test_evidence_of_an_order_is_where_both_appear(clips):
    for clip in clips:
        orders = [q for q in clip.asked if q.form == "order"]
        assert orders
        for q in orders:
            (cells,) = q.evidence
            steps = sorted({cell // NUM_PATCHES // 2 for cell in cells})
            assert len(steps) == 2
            first, last = q.text.split()[4], q.text.split()[7]
            assert q.answer in (first, last)
            for step in steps:
                shown = [c for c in cells if c // NUM_PATCHES == 2 * step]
                # it was not there a step before
                if step > 0:
                    assert sum(not still(clip.frames, c, 2 * step - 2) for c in shown) > 0


def test_pairs_are_asked_both_ways_with_one_answer(clips):
    for clip in clips[:10]:
        answers = {}
        for q in clip.asked:
            if q.form in ("order", "late"):
                words = q.text.split()
                key = (words[2], frozenset((words[4], words[7])))
                answers.setdefault(key, []).append(q.answer)
        assert answers
        assert all(len(given) == 2 and len(set(given)) == 1 for given in answers.values())
        for (word, pair), given in answers.items():
            other = answers[{"first": "last", "last": "first"}[word], pair]
            assert pair == {given[0], other[0]}


def test_evidence_of_a_change_is_before_and_after_it(clips):
    for clip in clips:
        (changed,) = [q for q in clip.asked if q.form == "changed"]
        (before,) = [q for q in clip.asked if q.form == "first"]
        (after,) = [q for q in clip.asked if q.form == "last"]
        assert changed.answer in before.text
        assert changed.answer in after.text
        assert before.answer != after.answer
        early, late = sorted({cell // NUM_PATCHES for cell in changed.evidence[0]})
        assert late - early == 2
        cells = [c for c in changed.evidence[0] if c // NUM_PATCHES == late]
        assert any(not still(clip.frames, c, early) for c in cells)
        # as it is from there on, to the last frame
        assert all(still(clip.frames, c, FRAMES - 1) for c in after.evidence[0])
        assert {c // NUM_PATCHES for c in after.evidence[0]} == {late}


def test_every_word_is_known(clips):
    for clip in clips:
        assert {w for q in clip.asked for w in f"{q.text} {q.answer}".split()} <= set(WORD_ID)


@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_held_out_answers_are_balanced_and_repeat(kind):
    questions = held_out_clips(kind, 32)
    first, again = ([(q.prompt, q.answer) for q in held_out_clips(kind, 6)] for _ in range(2))
    assert first == again
    assert all(q.prompt.startswith("<video> ") and q.kind == kind for q in questions)
    assert all(
        0 <= c < FRAMES * NUM_PATCHES and c // NUM_PATCHES % 2 == 0
        for q in questions
        for c in q.evidence
    )
    if kind == "clip_order":
        # neither place in the question is right more often than the other
        named = [q.prompt.split().index(q.answer) for q in questions]
        assert Counter(named)[5] in range(8, 25)
        assert max(Counter(q.answer for q in questions).values()) <= 4
    else:
        # 20 could be split unevenly without too much of any answer
        for asked in (questions, held_out_clips(kind, 20)):
            forms = Counter("changed" in q.prompt for q in asked)
            assert forms[True] == forms[False]
        for words in (SHAPES, COLORS):
            found = Counter(q.answer for q in questions if q.answer in words)
            assert max(found.values()) <= 2
            assert len(found) == 8
    assert CLIP_CHANCE[kind] <= 0.5


def test_held_out_clips_are_not_trained_on():
    (question,) = held_out_clips("clip_order", 1)
    for index in range(20):
        assert (show_clip(0, "train", index).frames != question.frames).any()


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="'order'"):
        held_out_clips("order", 1)
    with pytest.raises(ValueError, match="n must be an integer >= 1"):
        held_out_clips("clip_order", 0)


def test_visitors_never_meet(clips):
    """Else one would change the other's look: all are drawn after the residents, in turn."""
    for clip in clips:
        guests = {q.answer for q in clip.asked if q.form in ("order", "late")}
        first = {
            q.text.split()[4]: min(c // NUM_PATCHES for c in q.evidence[0])
            for q in clip.asked
            if q.form == "visit"
        }
        assert set(first) == guests
        assert len(set(first.values())) == len(first) <= STEPS
