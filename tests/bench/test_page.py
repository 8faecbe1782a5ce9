"""The report page: what it says, what it refuses, and that it is one safe file."""

import json
import random
from functools import partial
from itertools import pairwise

import pytest
from tests.bench.html_checks import colours, contrast, faults, mixed, outside, read, visible
from tests.bench.stored import change, remark, restamp, write_results

from vispress.bench.page.axes import AXES
from vispress.bench.page.frontier import HIGHLIGHTED, highlighted, overview
from vispress.bench.page.questions import failures, samples, shown_budget, shown_cells
from vispress.bench.page.render import _TEMPLATES, page, write_page
from vispress.bench.page.results import read as read_folder
from vispress.bench.page.verdicts import findings, verdict_tables
from vispress.bench.results.files import ResultsError

SKILLS = {"good": 0.95, "poor": 0.35, "random": 0.7, "uniform": 0.75, "no_image": 0.13}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_results(tmp_path_factory.mktemp("stored") / "results", SKILLS, questions=40)


@pytest.fixture(scope="module")
def results(folder):
    return read_folder(folder)


@pytest.fixture(scope="module")
def html(results):
    return page(results, None)


def test_the_page_loads_nothing_from_outside(html):
    assert outside(html) == []
    assert "default-src 'none'" in html


@pytest.mark.parametrize(
    "text",
    [
        '<img src="https://example.org/x.png">',
        '<script src="//example.org/x.js"></script>',
        "<use href='http://example.org/a.svg#b'/>",
        '<link rel="stylesheet" href="style.css">',
        "<style>@import 'x.css';</style>",
        "<style>p { background: url(x.png) }</style>",
        '<p style="background: url(https://example.org/x.png)"></p>',
        "<script>fetch('x')</script>",
    ],
)
def test_the_search_for_outside_references_can_fail(text):
    assert outside(text)


def test_the_page_is_well_formed_and_named(html):
    assert faults(html) == []
    assert '<html lang="en">' in html


@pytest.mark.parametrize(
    "text",
    [
        "<p><b></p></b>",
        "<a href='#nowhere'>x</a>",
        '<p id="a"></p><p id="a"></p>',
        "<svg></svg>",
        "<table><tr><th>x</th></tr></table>",
        "<input>",
    ],
)
def test_the_search_for_faults_can_fail(text):
    assert faults(text)


def test_every_part_is_there(html):
    ids = {a["id"] for _, a, _ in read(html).elements if "id" in a}
    wanted = {"findings", "frontier", "methods", "tasks-heat", "tests", "results", "cost", "tasks"}
    assert wanted | {"kept", "sources"} <= ids
    words = visible(read(html))
    for text in ("prefill time", "time to first token", "0123456789ab", "what needle needs"):
        assert text in words
    assert "Unfinished run" not in words


def test_the_same_folder_gives_the_same_bytes(folder, tmp_path):
    first = write_page(folder, tmp_path / "a.html", pictures=False)
    second = write_page(folder, tmp_path / "b.html", pictures=False)
    assert first.read_bytes() == second.read_bytes()


def test_names_and_answers_are_escaped(tmp_path):
    bad = "<script>alert(1)<'&\">"
    groups = {bad: 0.9, "random": 0.7}
    folder = write_results(tmp_path / "r", groups, questions=4, keep_ratios=(0.5,), truth=bad)

    def rename(manifest):
        manifest["plan"]["model"] = manifest["tasks"]["needle"]["needs"] = bad

    restamp(folder, rename)
    text = page(read_folder(folder), None)
    assert faults(text) == []
    assert "<script>alert" not in text
    assert bad in visible(read(text))
    assert len([tag for tag, _, _ in read(text).elements if tag == "script"]) == 1


def test_an_unfinished_run_says_so_first(tmp_path):
    skip = ["good--0.25", "none"]
    folder = write_results(tmp_path / "r", SKILLS, skip=skip, questions=6)
    text = page(read_folder(folder), None)
    words = visible(read(text))
    assert "Unfinished run 2 of 10 cells are not finished" in words
    assert "the uncompressed model is not among it" in words
    assert words.index("Unfinished run") < words.index("What stands", words.index("Intervals"))
    assert "good--0.25" in words
    assert faults(text) == []


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    keys = ["none", "no_image", *(f"{g}--{r}" for g in ("good", "random") for r in (0.5, 0.25))]
    skills = {name: SKILLS[name] for name in ("good", "random", "no_image")}
    folder = write_results(tmp_path / "r", skills, skip=keys)
    text = page(read_folder(folder), None)
    assert "6 of 6 cells are not finished" in visible(read(text))
    assert faults(text) == []


def test_without_times_and_controls_there_are_fewer_parts(tmp_path):
    folder = write_results(tmp_path / "r", {"good": 0.9}, timed=False, questions=6)
    text = page(read_folder(folder), None)
    ids = {a["id"] for _, a, _ in read(text).elements if "id" in a}
    assert not ids & {"cost", "tests", "findings"}
    assert {"frontier", "results"} <= ids
    assert "prefill time" not in visible(read(text))
    assert faults(text) == []


def test_cells_that_could_not_run_are_listed_with_their_reason(tmp_path):
    folder = write_results(tmp_path / "r", SKILLS, refused=["good--0.25"], questions=6)
    words = visible(read(page(read_folder(folder), None)))
    assert "this budget cannot be reached" in words
    assert "1 of them not possible" in words
    assert "Not run at this budget: good." in words


def test_cells_of_several_machines_are_told_apart(folder, tmp_path):
    copied = write_results(tmp_path / "r", {"good": 0.9, "random": 0.7}, questions=6)
    path = copied / "cells" / "good--0.5.json"
    change(path, lambda cell: cell["provenance"].update(device="another one"))
    words = visible(read(page(read_folder(copied), None)))
    assert "not all made in the same place" in words
    assert "another one" in words


def test_a_clock_that_went_back_is_said(tmp_path):
    folder = write_results(tmp_path / "r", {"good": 0.9}, questions=4)
    assert "clock" not in visible(read(page(read_folder(folder), None)))
    early = {"finished": "2025-12-31T23:59:59"}
    change(folder / "cells" / "none.json", lambda cell: cell.update(early))
    words = visible(read(page(read_folder(folder), None)))
    assert "cells were finished before the run began" in words
    assert "last cell finished 2026-01-02T03:05:06" in words


def damage(name, change):
    """A folder in which one file was changed."""

    def make(tmp_path):
        folder = write_results(tmp_path / "r", {"good": 0.9, "random": 0.7}, questions=4)
        path = folder / name
        data = json.loads(path.read_text())
        path.write_text(change if isinstance(change, str) else json.dumps(change(data)))
        return folder

    return make


CELL = "cells/good--0.5.json"
BROKEN = {
    "half a cell": (damage(CELL, '{"key": '), "good--0.5.json is damaged"),
    "no object": (damage(CELL, "[]"), "no JSON object"),
    "of another run": (
        damage(CELL, lambda d: d | {"identity": d["identity"] | {"commit": "fff"}}),
        r"another run than run\.json .commit fff in place of 0123456789ab",
    ),
    "of another key": (damage(CELL, lambda d: d | {"key": "x"}), "it says it is 'x'"),
    "without a task": (
        damage(CELL, lambda d: d | {"tasks": {}}),
        r"tasks are \[\], the plan asks \['attribute', 'needle'\]",
    ),
    "too few answers": (
        damage(CELL, lambda d: d["tasks"]["needle"].update(answers=["a"]) or d),
        "needle: .* 4 marks, 4 scores and 1 answers for 4 questions",
    ),
    "without provenance": (
        damage(CELL, lambda d: d | {"provenance": None}),
        "provenance must be a mapping, got None",
    ),
    "half a manifest": (damage("run.json", '{"plan"'), "run.json is damaged"),
    "manifest without plan": (damage("run.json", lambda d: {"identity": {}}), "plan is missing"),
    "task without card": (damage("run.json", lambda d: d | {"tasks": {}}), "tasks describes"),
    "of another version": (
        lambda tmp_path: restamp(damage("run.json", lambda d: d)(tmp_path), version="0.0.1"),
        "results of vispress 0.0.1",
    ),
    "of another version, with another plan": (
        lambda tmp_path: restamp(
            damage("run.json", lambda d: d)(tmp_path),
            lambda manifest: manifest["plan"].update(words=3),
            version="0.0.1",
        ),
        r"plan\.words is not known.*\(vispress 0\.0\.1 wrote it",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_refused_by_name(tmp_path, name):
    make, words = BROKEN[name]
    with pytest.raises(ResultsError, match=words):
        read_folder(make(tmp_path))


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ResultsError, match="holds no results"):
        write_page(tmp_path)


def test_findings_name_only_what_a_test_shows(results):
    shown = {(c.group, c.keep_ratio) for c in results.summary.comparisons if c.significant}
    assert shown  # the fixture has differences
    for finding in findings(results):
        ratio = float(finding.budget)
        for name in (*finding.better, *finding.worse):
            assert (name, ratio) in shown
        assert {*finding.better, *finding.worse, *finding.equal} == {"good", "poor"}
    (first, *_) = findings(results)
    assert first.better == ("good",)
    assert first.worse == ("poor",)


def test_a_difference_that_is_not_shown_is_never_a_verdict(tmp_path):
    folder = write_results(tmp_path / "r", {"same": 0.7, "random": 0.7}, questions=8)
    results = read_folder(folder)
    assert all(finding.better == finding.worse == () for finding in findings(results))
    (table,) = verdict_tables(results)
    assert {v.verdict for _, row in table.rows for v in row} == {"equal"}
    words = visible(read(page(results, None)))
    assert "as random at all 2 budgets" in words


def test_colours_go_to_few_methods_in_the_order_of_the_plan(tmp_path):
    groups = {f"m{i}": 0.99 for i in range(9)} | {"random": 0.4}
    folder = write_results(tmp_path / "r", groups, questions=40, keep_ratios=(0.5,))
    slots = highlighted(read_folder(folder))
    assert len(slots) == HIGHLIGHTED
    assert list(slots) == sorted(slots)
    assert sorted(slots.values()) == list(range(HIGHLIGHTED))


def test_all_methods_of_a_small_plan_have_a_colour_and_a_label(tmp_path):
    groups = {"mine": 0.5, "good": 0.9, "random": 0.5}
    results = read_folder(write_results(tmp_path / "r", groups, questions=8))
    assert highlighted(results) == {"mine": 0, "good": 1}
    plot = overview(results, AXES[0], wide=True)
    assert plot is not None
    assert {"mine", "good", "random"} <= {label.text for label in plot.labels}
    assert "In colour: all methods" in visible(read(page(results, None)))


def test_of_many_methods_none_has_a_colour_that_is_not_shown_to_be_better(tmp_path):
    groups = {f"m{i}": 0.7 for i in range(9)} | {"random": 0.7}
    folder = write_results(tmp_path / "r", groups, questions=8, keep_ratios=(0.5,))
    assert highlighted(read_folder(folder)) == {}


@pytest.mark.slow
def test_labels_never_lie_on_one_another(tmp_path):
    draw = random.Random(0)
    groups = {f"m{i}": 0.7 + 0.3 * draw.random() for i in range(20)}
    groups |= {"random": 0.4, "uniform": 0.42, "oracle": 1.0, "no_image": 0.13}
    results = read_folder(write_results(tmp_path / "r", groups, questions=24))
    for axis in AXES:
        plot = overview(results, axis, wide=True)
        places = sorted(float(label.y) for label in plot.labels)
        assert len(places) >= 6
        gaps = [b - a for a, b in pairwise(places)]
        assert min(gaps) >= 16.5
        assert plot.top <= places[0]
        assert places[-1] <= plot.bottom
        for mark in (m for s in plot.series for m in s.marks):
            assert plot.left <= float(mark.x) <= plot.right
            assert plot.top <= float(mark.y) <= plot.bottom
        # the oracle is an upper bound, not one of the methods
        assert {s.kind for s in plot.series if s.name == "oracle"} == {"bound"}


def by_hand(tmp_path, marks):
    """A folder at one budget with these marks of one task; the first is the uncompressed model."""
    groups = {name: 0.5 for name in marks if name != "none"}
    n = len(marks["none"])
    folder = write_results(
        tmp_path / "r", groups, questions=n, tasks=("attribute",), keep_ratios=(0.5,)
    )
    for name, right in marks.items():
        path = folder / "cells" / (f"{name}--0.5.json" if name != "none" else "none.json")
        answers = ["red" if mark == "1" else "blue" for mark in right]
        change(path, partial(remark, task="attribute", right=right, answers=answers))
    return read_folder(folder)


def test_failures_are_what_most_methods_lose(tmp_path):
    results = by_hand(
        tmp_path,
        {"none": "111101", "a": "101001", "b": "100011", "c": "100001", "random": "000000"},
    )
    found = failures(results)
    # 1: lost by all; 3: lost by all; 2: by two of three; 4: the uncompressed model is wrong;
    # at most two of a task
    assert [(pick.index, pick.why) for pick in found] == [
        (1, "3 of 3 methods get it wrong"),
        (3, "3 of 3 methods get it wrong"),
    ]


def test_samples_are_the_first_and_what_divides_methods(tmp_path):
    marks = {"none": "1111", "a": "1110", "b": "1100", "c": "1000", "d": "1000", "random": "0000"}
    results = by_hand(tmp_path, marks)
    # wrong: 0, 2 of 4, 3 of 4, 4 of 4
    assert [pick.index for pick in samples(results, 2)] == [0, 1]
    assert [pick.index for pick in samples(results, 3)] == [0, 1, 2]
    assert samples(results, 0) == []


def test_pictures_are_of_the_budget_that_most_methods_reach(tmp_path):
    skills = {"a": 0.5, "b": 0.5, "random": 0.5, "no_image": 0.1}
    refused = ["a--0.25"]
    folder = write_results(tmp_path / "r", skills, questions=4, refused=refused)
    results = read_folder(folder)
    assert shown_budget(results) == 0.5
    assert [cell["key"] for cell in shown_cells(results)] == ["a--0.5", "b--0.5", "random--0.5"]


def test_the_plan_on_the_page_is_the_plan(make_plan, tmp_path):
    import yaml

    from vispress.bench.page.sources import _yaml
    from vispress.bench.plan.plan import plan_from_mapping

    plan = make_plan(positions="compact")
    assert plan_from_mapping(yaml.safe_load(_yaml(plan.to_dict()))).digest() == plan.digest()


def test_text_can_be_read_in_both_themes():
    css = (_TEMPLATES / "style.css").read_text()
    for theme in colours(css):
        ground = theme["bg"]
        for name in ("ink", "soft", "link", "good", "bad"):
            assert contrast(theme[name], ground) >= 4.5, name
        assert contrast(theme["warn"], theme["warn-bg"]) >= 4.5
        assert contrast(theme["soft"], theme["faint"]) >= 4.5
        for slot in range(HIGHLIGHTED):
            assert contrast(theme[f"s{slot}"], ground) >= 4.5, slot
        # cells of the heat map at their fullest
        for name, share in (("heat", 0.62), ("up", 0.68), ("down", 0.68)):
            assert contrast(theme["ink"], mixed(theme[name], ground, share)) >= 4.5, name
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
