"""Questions on the page: what is shown of them, and that it is what the model kept and said."""

import re

import numpy as np
import pytest
from PIL import Image
from tests.bench.html_checks import faults, outside, read, visible
from tests.bench.stored import change, remark, restamp

from vispress.bench.page.exhibits import make_picture, outline, runs, shot_of, words
from vispress.bench.page.gallery import gallery
from vispress.bench.page.render import page, write_page
from vispress.bench.page.results import read as read_folder
from vispress.bench.plan.plan import plan_from_mapping
from vispress.bench.run.engine import run
from vispress.bench.tasks.task import Prompt, Task, register_task
from vispress.report import ImageReport, PlacementReport


@pytest.fixture(scope="module")
def plan(checkpoint):
    return plan_from_mapping(
        {
            "model": str(checkpoint),
            "tasks": ["attribute", "needle"],
            "methods": ["fastv", "divprune"],
            "keep_ratios": [0.5],
            "questions": 3,
            "batch_size": 3,
            "max_new_tokens": 2,
            "timing": {"batch": 0},
        }
    )


@pytest.fixture(scope="module")
def folder(plan, tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "results"
    run(plan, out)
    return out


@pytest.fixture(scope="module")
def results(folder):
    return read_folder(folder)


@pytest.fixture(scope="module")
def shown(results):
    return gallery(results, number=2)


@pytest.fixture(scope="module")
def html(results, shown):
    return page(results, shown)


@pytest.mark.slow
def test_the_page_with_pictures_is_whole_and_loads_nothing(html):
    assert outside(html) == []
    assert faults(html) == []
    assert html.count("data:image/png;base64,") >= 4
    assert len(html.encode()) < 1_000_000


@pytest.mark.slow
def test_pictures_make_the_same_bytes_too(folder, html, tmp_path):
    again = write_page(folder, tmp_path / "page.html")
    assert again.read_text() == html


def test_answers_shown_are_those_stored(results, shown):
    assert len(shown.samples) == 4
    stored = {cell["cell"]["group"]: cell for cell in results.answered}
    names = {"uncompressed": "none", "no image": "no_image"}
    for exhibit in shown.samples:
        for view in exhibit.views:
            task = stored[names.get(view.name, view.name)]["tasks"][exhibit.pick.task]
            assert view.answer == task["answers"][exhibit.pick.index]
            assert view.right == (task["right"][exhibit.pick.index] == "1")
    assert any("gave all" in note for note in shown.notes)


def test_what_is_kept_is_shown_as_the_budget_says(shown):
    for exhibit in shown.samples:
        views = {view.name: view for view in exhibit.views}
        assert views["divprune"].kept == "72 of 144"
        # before layer 1 of 4 all are there: (4 * 72 - 144) / 3
        assert views["fastv"].kept == "48 of 144"
        for name in ("divprune", "oracle"):
            (shot,) = views[name].shots
            dropped = sum(int(n) for _, d in shot.shades for n in re.findall(r"h(\d+)v", d))
            assert dropped == 72
        # the oracle keeps all evidence that fits
        left, total = views["oracle"].shots[0].needed
        assert left == total > 0
        # smaller pictures have no kept tokens to show
        assert not views["downsample"].shots
        assert views["downsample"] in exhibit.others
        assert exhibit.whole.name == "uncompressed"


def test_questions_that_are_not_those_asked_are_not_shown(folder, tmp_path):
    import shutil

    copied = tmp_path / "r"
    shutil.copytree(folder, copied)

    def invert(cell):
        task = cell["tasks"]["needle"]
        right = "".join("10"[int(mark)] for mark in task["right"])
        remark(cell, "needle", right, task["answers"])
        task |= {"low": 0.0, "high": 1.0}

    change(copied / "cells" / "none.json", invert)
    shown = gallery(read_folder(copied), number=1)
    assert {exhibit.pick.task for exhibit in shown.samples} == {"attribute"}
    assert any(note.startswith("needle: the questions drawn here") for note in shown.notes)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"weights": "beef"}, "measured were beef"),
        ({"model": "somebody/else"}, "the model 'somebody/else' is not at hand"),
    ],
)
def test_without_the_model_answers_are_shown_without_kept_tokens(folder, tmp_path, changes, note):
    import shutil

    copied = tmp_path / "r"
    shutil.copytree(folder, copied)
    own = {name: changes[name] for name in changes if name == "model"}
    rest = {name: changes[name] for name in changes if name not in own}
    restamp(copied, lambda manifest: manifest["plan"].update(own), **rest)
    results = read_folder(copied)
    shown = gallery(results, number=1)
    assert note in " ".join(shown.notes)
    assert not any(view.shots for exhibit in shown.samples for view in exhibit.views)
    assert all(exhibit.pictures for exhibit in shown.samples)
    text = page(results, shown)
    assert faults(text) == []
    assert "divprune" in visible(read(text))


def test_an_unknown_task_is_named(folder, tmp_path):
    import shutil

    copied = tmp_path / "r"
    shutil.copytree(folder, copied)
    for path in [copied / "run.json", *(copied / "cells").glob("*.json")]:
        path.write_text(path.read_text().replace('"needle"', '"gone"'))
    restamp(copied)
    shown = gallery(read_folder(copied), number=1)
    notes = " ".join(shown.notes)
    assert "gone: its questions cannot be drawn here" in notes
    assert {exhibit.pick.task for exhibit in shown.samples} == {"attribute"}


def test_several_pictures_and_turns_are_shown_together(checkpoint, tmp_path, monkeypatch):
    from vispress.bench.tasks import task as tasks

    monkeypatch.setattr(tasks, "_TASKS", {})
    images = [Image.new("RGB", (96, 96), color) for color in ("red", "green")]
    bad = "<image> <image> what <script> ? :"
    prompt = Prompt(tuple(images), bad, "red", ((0, 1), ()), (("and what ? :", "blue"),))
    register_task(Task("pairs", "both pictures", 0.1, lambda n, seed: [prompt] * n))
    plan = plan_from_mapping(
        {
            "model": str(checkpoint),
            "tasks": ["pairs"],
            "methods": ["divprune"],
            "keep_ratios": [0.5],
            "questions": 1,
            "controls": "none",
            "max_new_tokens": 2,
            "timing": {"batch": 0},
        }
    )
    run(plan, tmp_path / "r")
    results = read_folder(tmp_path / "r")
    shown = gallery(results, number=1)
    (exhibit,) = shown.samples
    assert len(exhibit.pictures) == 2
    assert exhibit.truth == "red / blue"
    assert exhibit.turns == ("and what?",)
    (view,) = [view for view in exhibit.views if view.shots]
    assert view.kept == "144 of 288"
    assert [shot.needed is None for shot in view.shots] == [False, True]
    text = page(results, shown)
    assert faults(text) == []
    assert "<script> ?" not in text
    assert "what <script>?" in visible(read(text))


def image_report(kept, grid, placements):
    made = tuple(PlacementReport("m", "in_llm", layer, len(k), k) for layer, k in placements)
    count = grid[0] * grid[1] * grid[2]
    return ImageReport("image", count, len(kept), kept, tuple(range(count)), grid, made)


def test_a_shot_by_hand():
    # 2 x 3 tokens; evidence is the upper left quarter of the picture: it overlaps tokens 0 and 1
    evidence = tuple(12 * row + column for row in range(6) for column in range(6))
    image = image_report((0, 5), (1, 2, 3), [(0, (0, 5))])
    shot = shot_of(image, evidence)
    assert (shot.columns, shot.rows, shot.kept, shot.total) == (3, 2, 2, 6)
    assert shot.needed == (1, 2)
    assert shot.shades == (("0.84", "M1 0h2v1h-2zM0 1h2v1h-2z"),)


def test_tokens_that_leave_later_are_dimmed_less():
    image = image_report((0,), (1, 1, 3), [(0, (0, 1)), (2, (0,))])
    shot = shot_of(image, ())
    assert [d for _, d in shot.shades] == ["M2 0h1v1h-1z", "M1 0h1v1h-1z"]
    first, second = (float(opacity) for opacity, _ in shot.shades)
    assert first > second
    assert shot.needed is None


def test_pictures_of_crops_are_not_drawn():
    image = ImageReport("image", 4, 1, (0,), (0, 1, 2, 3), None, ())
    assert shot_of(image, ()) is None


def test_runs_and_outlines_by_hand():
    assert runs([(0, 0), (0, 1), (1, 1)]) == "M0 0h2v1h-2zM1 1h1v1h-1z"
    # two cells side by side: the edge between them is not drawn
    border = outline([0, 1], 12)
    assert border.count("M") == 6
    assert "M1 0v1" not in border
    assert outline([], 12) == ""


def test_large_pictures_are_made_small():
    noise = np.random.default_rng(0).random((700, 900, 3))
    picture = make_picture("key", noise, ())
    assert picture.uri.startswith("data:image/jpeg;base64,")
    assert len(picture.uri) < 60_000
    assert picture.aspect == pytest.approx(9 / 7)


def test_prompts_are_shown_as_questions():
    assert words("<image> what color is it ? :") == "what color is it?"
    assert words("<image> <image> which one ? :") == "<image> <image> which one?"
