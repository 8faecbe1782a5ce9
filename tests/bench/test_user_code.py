"""A user's own methods and tasks: run from a plan or `--import`, benched, and drawn on the page."""

import sys

import pytest
from tests.tiny_checkpoints import picture

from vispress import registry
from vispress.bench.page.gallery import gallery
from vispress.bench.page.results import read as read_folder
from vispress.bench.plan.plan import load_plan, plan_from_mapping
from vispress.bench.results.stored import manifest_fault
from vispress.bench.run.engine import run
from vispress.bench.tasks import task as tasks
from vispress.errors import ConfigError
from vispress.user_code import import_file, import_files

METHOD = """
from dataclasses import dataclass
from vispress import register_method
from vispress.methods.max_norm import MaxNorm

@register_method("mine")
@dataclass(frozen=True, kw_only=True)
class Mine(MaxNorm):
    evidence = "own"
"""
PLAN = """
import: [my_method.py]
tasks: [attribute, {name: described, dataset: rows.jsonl, metric: contains, shuffle: false}]
methods: [mine, divprune]
keep_ratios: [0.5]
questions: 2
controls: none
max_new_tokens: 1
timing: {batch: 0}
"""


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Nothing that is registered here shows up in other tests."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
    yield
    for name in [name for name in sys.modules if name.startswith("vispress_user_")]:
        del sys.modules[name]


@pytest.fixture
def home(tmp_path):
    """A plan with a method of its own and a described task."""
    (tmp_path / "my_method.py").write_text(METHOD)
    (tmp_path / "plan.yaml").write_text(PLAN)
    rows = '{"question": "what color is it ?", "answer": "red", "image": "a.png"}\n'
    (tmp_path / "rows.jsonl").write_text(rows * 2)
    picture(8, 8, 0).save(tmp_path / "a.png")
    return tmp_path


def test_a_plan_runs_what_it_names_and_its_page_shows_all_of_it(home, checkpoint, monkeypatch):
    monkeypatch.chdir(home.parent)  # paths start at the plan, not here
    plan = load_plan(home / "plan.yaml", model=str(checkpoint))
    run(plan, home / "out")
    results = read_folder(home / "out")
    assert manifest_fault(results.manifest) is None
    # read by another process, which knows neither task nor method
    registry._METHODS.pop("mine")
    tasks._TASKS.pop("described")
    shown = gallery(results, number=1)
    assert {exhibit.pick.task for exhibit in shown.samples} == {"attribute", "described"}
    assert "unknown method 'mine'" in " ".join(shown.notes)
    assert "it was run with --import my_method.py" in " ".join(shown.notes)
    sys.modules.pop(f"vispress_user_{plan.imports['my_method.py']}")
    import_files([home / "my_method.py"])
    shown = gallery(results, number=1)
    shots = {view.name for exhibit in shown.samples for view in exhibit.views if view.shots}
    assert {"mine", "divprune"} <= shots
    (home / "rows.jsonl").write_text((home / "rows.jsonl").read_text().replace("red", "blue"))
    shown = gallery(results, number=1)
    assert "described: its questions cannot be drawn here" in " ".join(shown.notes)


def test_other_code_is_another_plan_and_no_code_is_the_plan_it_was(home, checkpoint):
    plan = load_plan(home / "plan.yaml", model=str(checkpoint))
    (home / "my_method.py").write_text(METHOD + "\n# changed\n")
    registry._METHODS.pop("mine")
    assert load_plan(home / "plan.yaml", model=str(checkpoint)).digest() != plan.digest()
    bare = {"tasks": ["count"], "methods": ["divprune"], "keep_ratios": [0.5]}
    assert "imports" not in plan_from_mapping(bare).to_dict()


def test_files_are_run_once_and_beside_those_of_the_plan(home, tmp_path):
    (log := tmp_path / "log").write_text("")
    (tmp_path / "other.py").write_text(f"with open({str(log)!r}, 'a') as f: f.write('run ')")
    plan = load_plan(home / "plan.yaml", imports=[tmp_path / "other.py"])
    assert set(plan.imports) == {"my_method.py", "other.py"}
    import_file(tmp_path / "other.py")
    assert log.read_text() == "run "


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\nimport no_such_module", r"my_method.py, line 2: ModuleNotFoundError: No module named"),
        ("def f(:", r"my_method.py, line 1: SyntaxError"),
        ("raise SystemExit(3)", "line 1: SystemExit: 3"),
        (METHOD.replace('"mine"', '"fastv"'), "'fastv' is already registered"),
        (None, "cannot import .*my_method.py: No such file"),
    ],
    ids=["module", "syntax", "exit", "taken", "missing"],
)
def test_what_cannot_be_run_is_named_with_its_line(home, text, words):
    (home / "my_method.py").unlink()
    if text is not None:
        (home / "my_method.py").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_plan(home / "plan.yaml")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("import: [1]", "import must be a list of Python files"),
        ("import: [my_method.sh]", "only Python files"),
        ("imports: [my_method.py]", "unknown key 'imports'; did you mean 'import'"),
    ],
)
def test_a_plan_with_a_wrong_import_is_refused(home, line, words):
    path = home / "plan.yaml"
    path.write_text(PLAN.replace("import: [my_method.py]", line))
    with pytest.raises(ConfigError, match=words):
        load_plan(path)
