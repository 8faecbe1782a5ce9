"""What papers print beside what was measured, and the plan that reproduces a method."""

import json
import sys

import pytest
from tests.bench.html_checks import faults, read, visible
from tests.bench.stored import restamp, write_results

from vispress import cli
from vispress.bench.page.render import page
from vispress.bench.page.results import read as read_folder
from vispress.bench.plan.plan import load_plan
from vispress.bench.plan.published import load_published
from vispress.bench.plan.reproduce import reproduction
from vispress.bench.results.published import beside_published
from vispress.bench.results.summary import summarise
from vispress.bench.tasks.task import get_task
from vispress.errors import ConfigError, UnsupportedMethodError
from vispress.registry import get_method
from vispress.yaml_files import shipped_files


@pytest.mark.parametrize("name", sorted(shipped_files("published")))
def test_shipped_figures_are_of_known_methods_and_tasks(name):
    published = load_published(name)
    for table in published.tables:
        for method, printed in table.relative.items():
            get_method(method)
            assert all(0 < tokens <= published.tokens for tokens in printed)
            assert all(30 < value < 105 for value in printed.values())
        for method, printed in table.scores.items():
            if method != "whole":
                get_method(method)
            for scores in printed.values():
                assert all(get_task(task).name == task for task in scores)


@pytest.fixture
def folder(tmp_path):
    """DivPrune at 64 of 576 tokens and at a budget that nobody prints."""
    out = write_results(
        tmp_path / "r", {"divprune": 0.8, "random": 0.6}, keep_ratios=(0.111, 0.5), questions=40
    )
    restamp(out, lambda manifest: manifest["plan"].update(published="llava15"))
    return out


def test_a_row_stands_beside_what_is_printed_at_its_tokens(folder):
    summary = summarise(folder)
    found = beside_published(summary)
    assert {(one.group, one.tokens) for one in found} == {("divprune", 64)}
    (one,) = found
    row = next(r for r in summary.rows if r.group == "divprune" and r.keep_ratio == 0.111)
    whole = summary.find("none")
    ratios = [row.tasks[task].mean / whole.tasks[task].mean for task in row.tasks]
    assert one.measured == pytest.approx(100 * sum(ratios) / len(ratios))
    assert one.low < one.measured < one.high
    assert one.printed == 94.7
    assert one.source.startswith("CDPruner")
    text = page(read_folder(folder), None)
    assert faults(text) == []
    assert "Beside what papers print" in visible(read(text))


def test_scores_of_tasks_stand_beside_printed_ones(tmp_path):
    out = write_results(
        tmp_path / "r", {"cdpruner": 0.6}, keep_ratios=(0.111,), tasks=("gqa", "pope")
    )
    restamp(out, lambda manifest: manifest["plan"].update(published="llava15"))
    printed = {one.what: one.printed for one in beside_published(summarise(out))}
    assert printed == {"relative": 97.0, "gqa": 58.6, "pope": 87.5}


def test_without_printed_figures_nothing_stands_there(tmp_path):
    out = write_results(tmp_path / "r", {"divprune": 0.8}, keep_ratios=(0.111,))
    assert beside_published(summarise(out)) == []


def test_the_plan_of_a_method_is_its_own_setting_and_every_printed_budget():
    plan = reproduction("divprune", model="reference", tasks=["count"], questions=7)
    groups = [cell.group for cell in plan.cells()]
    assert groups == ["none", "divprune", "divprune-128", "divprune-64", "divprune-32"]
    own, at_128 = plan.cells()[1].chain[0], plan.cells()[2].chain[0]
    assert own.keep_ratio == 0.098
    assert at_128.mean_keep_ratio == pytest.approx(128 / 576, abs=1e-6)
    assert (plan.tasks, plan.questions, plan.model) == (("count",), 7, "reference")
    assert plan.published == "llava15"
    # a schedule takes no other budget
    assert len(reproduction("pyramiddrop").cells()) >= 2
    assert len(reproduction("transprune").cells()) == 2


def test_every_method_has_a_plan_on_every_model():
    for plan in ("llava15", "qwen25vl", "qwen3vl", "internvl"):
        base = load_plan(plan)
        for method in ("fastv", "sparsevlm", "visionzip", "tome", "debias", "vtw", "scm"):
            assert reproduction(method, plan).tasks == base.tasks


def test_what_cannot_be_reproduced_is_named():
    with pytest.raises(UnsupportedMethodError, match="did you mean 'divprune'"):
        reproduction("divprun")
    with pytest.raises(ConfigError, match="no plan 'lava15'"):
        reproduction("divprune", "lava15")
    with pytest.raises(ConfigError, match="published must be one of"):
        plan_with({"published": "nothing"})


def plan_with(changes):
    from vispress.bench.plan.plan import plan_from_mapping

    base = {"tasks": ["count"], "methods": ["divprune"], "keep_ratios": [0.5]}
    return plan_from_mapping(base | changes)


@pytest.mark.slow
def test_the_command_runs_it_on_a_local_task(tmp_path, monkeypatch, capsys, checkpoint):
    from tests.tiny_checkpoints import picture

    picture(8, 8, 0).save(tmp_path / "a.png")
    row = json.dumps({"question": "what color is it ?", "answer": "red", "image": "a.png"})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n{row}\n")
    (tmp_path / "mine.yaml").write_text("{dataset: rows.jsonl, metric: contains}")
    base = "{model: reference, tasks: [count], methods: [], keep_ratios: [], questions: 2,"
    base += " published: llava15, timing: {batch: 0}, max_new_tokens: 1}"
    (tmp_path / "base.yaml").write_text(base)
    words = ["reproduce", "fastervlm", "--plan", tmp_path / "base.yaml", "--model", checkpoint]
    words += ["--task", tmp_path / "mine.yaml", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["vispress", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    groups = {row.group for row in summarise(tmp_path / "out").rows}
    assert {"none", "fastervlm", "fastervlm-58", "fastervlm-432"} <= groups
    assert "uncompressed" in capsys.readouterr().out
