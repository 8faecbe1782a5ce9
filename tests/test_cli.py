"""The command line: what it prints, and one line and exit code 2 for every expected error."""

import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from tests.bench.conftest import checkpoint  # noqa: F401  (a fixture)
from vispress import cli, cli_options, doctor, registry, versions
from vispress.errors import UnsupportedVersionError

ROOT = Path(__file__).parents[1]
PICTURE = b"\x89PNG but no more of it"


def run_main(monkeypatch, *arguments):
    """Exit code of `vispress ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["vispress", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


def test_help_imports_nothing_heavy():
    code = "import sys, vispress.cli; print([m for m in ('torch', 'transformers', 'matplotlib', \
'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_methods_lists_every_method():
    output = CliRunner().invoke(cli.app, ["methods"], env={"COLUMNS": "200"}).output
    for name in registry.list_methods():
        assert f" {name} " in output
    assert "with [CLS]; others" in output


def test_methods_of_one_family():
    result = CliRunner().invoke(cli.app, ["methods", "--model", "qwen2_vl"])
    assert result.exit_code == 0
    assert "families: qwen2_vl (no [CLS])" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["methods", "--model", "lava"], "did you mean 'llava'"),
        (["bench", "smok"], "did you mean 'smoke'"),
        (["bench", "smoke", "--questions", "0"], "questions must be an integer >= 1"),
        (["bench", "smoke", "--model", "nowhere"], "a folder with a checkpoint"),
        (["bench", "smoke", "--out", "FILE/results", "--model", "MODEL"], "Not a directory"),
        (["bench", "smoke", "--device", "abacus", "--model", "MODEL"], "cannot use the device"),
        (["report", "nowhere"], "nowhere holds no results: run.json is missing"),
        (["show", "FILE", "--method", "fastv", "--question", "what"], "is not an image"),
        (["show", "none.png", "--method", "fastv", "--question", "what"], "No such file"),
        (["show", "none.png", "--method", "fastv"], "give --question"),
        (["show", "scene:x", "--method", "fastv"], "scene:SEED needs a number"),
        (["show", "scene:1", "--method", "fastv", "--question", "colour"], "unknown task"),
        (["show", "scene:1", "--method", "fastvv"], "did you mean 'fastv'"),
        (["show", "scene:1", "--method", "fastv", "--set", "leyer=2"], "did you mean 'layer'"),
        (["show", "scene:1", "--method", "fastv", "--set", "layer"], "--set needs KEY=VALUE"),
        (["show", "scene:1", "--method", "fastv", "--keep-ratio", "2"], "must be a number in"),
        (["show", "scene:1", "--method", "fastv", "--model", "MODEL"], "needs a budget"),
        (["search", "gready"], "strategy must be one of 'greedy', 'sigmoid'"),
        (["search", "greedy", "--flops", "0.5"], "takes no budget"),
        (["search", "sigmoid"], "give --keep-ratio or --flops"),
        (["search", "--model", "org/name"], "--task is needed"),
        (["search", "--method", "fastv"], "fastv has no layers and ratios"),
        (["search", "--metric", "speed"], "metric must be one of 'accuracy'"),
        (["search", "--task", "cuont"], "did you mean 'count'"),
        (["search", "--model", "MODEL", "--task", "count", "--out", "FILE/x"], "cannot write"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_exit_code_2(
    arguments, words, monkeypatch, capsys, tmp_path, request
):
    (tmp_path / "file").write_bytes(PICTURE)
    names = {"FILE": tmp_path / "file", "MODEL": None}
    if "MODEL" in arguments:
        names["MODEL"] = request.getfixturevalue("checkpoint")
    arguments = [a.replace("FILE", str(names["FILE"])) for a in arguments]
    arguments = [str(names["MODEL"]) if a == "MODEL" else a for a in arguments]
    capsys.readouterr()  # what making the checkpoint printed
    assert run_main(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "command", [["bench", "smoke"], ["demo"], ["train-reference"], ["fit-debias"]]
)
def test_missing_extras_are_named_before_anything_runs(monkeypatch, capsys, command):
    monkeypatch.setattr(cli_options, "_EXTRA", ("no_such_package",))
    assert run_main(monkeypatch, *command) == 2
    assert "pip install 'vispress[bench]'" in capsys.readouterr().err


def test_usage_errors_exit_with_2(monkeypatch):
    assert run_main(monkeypatch, "show") == 2
    assert run_main(monkeypatch, "nothing") == 2


@pytest.mark.slow
def test_show_draws_every_method(monkeypatch, capsys, tmp_path, request):
    model = request.getfixturevalue("checkpoint")
    methods = ["fastv", "pyramiddrop", "avg_pool", "no_image"]
    chosen = [word for name in methods for word in ("--method", name)]
    options = ["--keep-ratio", "0.5", "--set", "layers=[1, 2, 3]", "--model", model]
    target = tmp_path / "kept.png"
    question = ["--question", "needle", "--out", target]
    assert run_main(monkeypatch, "show", "scene:1", *chosen, *options, *question) == 0
    output = capsys.readouterr().out
    assert "72 of 144" in output
    assert "0 of 144" in output
    assert "right answer:" in output
    assert target.read_bytes().startswith(b"\x89PNG")


def test_show_takes_pictures_and_names_unknown_words(monkeypatch, capsys, tmp_path, request):
    from PIL import Image

    Image.new("L", (50, 80), 99).save(picture := tmp_path / "grey.png")
    model = request.getfixturevalue("checkpoint")
    arguments = ["--question", "What colour is it?", "--keep-ratio", "0.25", "--model", model]
    out = tmp_path / "kept.png"
    code = run_main(monkeypatch, "show", picture, "--method", "divprune", *arguments, "--out", out)
    assert code == 0
    assert "the model does not know: colour, it" in capsys.readouterr().out
    assert out.is_file()


@pytest.mark.slow
def test_bench_writes_tables_and_plots(monkeypatch, capsys, tmp_path, request):
    (plan := tmp_path / "plan.yaml").write_text(
        "{tasks: [count], methods: [uniform], keep_ratios: [0.25], questions: 2,"
        " controls: none, timing: {batch: 1, rounds: 2, repeats: 1}}"
    )
    model = request.getfixturevalue("checkpoint")
    out = tmp_path / "out"
    assert run_main(monkeypatch, "bench", plan, "--model", model, "--out", out) == 0
    output = capsys.readouterr().out
    assert "2/4 questions" in output
    assert "36.0 of 144" in output
    names = {path.name for path in out.iterdir()}
    assert {"run.json", "summary.json", "summary.csv", "frontier.png"} <= names
    # another plan on the same folder
    code = run_main(monkeypatch, "bench", plan, "--model", model, "--out", out, "--seed", "1")
    assert code == 2
    assert "--force" in capsys.readouterr().err


def test_search_writes_a_schedule_that_compresses(monkeypatch, capsys, tmp_path, request):
    from vispress.config import load_config

    model, out = request.getfixturevalue("checkpoint"), tmp_path / "out"
    arguments = ["--model", model, "--task", "count", "--questions", "2", "--out", out]
    asked = [*arguments, "--method", "pyramiddrop", "--tolerance", "0.1"]
    assert run_main(monkeypatch, "search", "greedy", *asked) == 0
    output = capsys.readouterr().out
    assert "; now layer 1 at" in output
    assert "of 144" in output
    assert f'compress_model(model, config="{out / "schedule.yaml"}")' in output
    assert load_config(out / "schedule.yaml").name == "pyramiddrop"
    asked = [*arguments, "--keep-ratio", "0.6", "--trials", "2", "--set", "queries=text"]
    assert run_main(monkeypatch, "search", "sigmoid", *asked) == 0
    found = load_config(out / "schedule.yaml")
    assert (found.name, found.queries, found.midpoint is None) == ("layerwise", "text", False)
    assert "sigmoid, 0.6 of tokens: kl" in (out / "schedule.yaml").read_text()


def test_report_makes_a_page_where_it_is_asked(monkeypatch, capsys, tmp_path):
    from tests.bench.stored import write_results

    folder = write_results(tmp_path / "r", {"good": 0.9, "random": 0.6}, questions=4)
    assert run_main(monkeypatch, "report", folder, "--no-pictures") == 0
    assert "report.html" in capsys.readouterr().out
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    page = tmp_path / "other.html"
    assert run_main(monkeypatch, "report", folder, "--out", page, "--no-pictures") == 0
    assert page.is_file()
    code = run_main(monkeypatch, "report", folder, "--no-pictures", "--out", folder / "no" / "p")
    assert code == 2
    assert "cannot write" in capsys.readouterr().err


def test_doctor_names_what_is_broken(monkeypatch):
    broken = doctor.Check("reference checkpoint", "broken", "gone")
    monkeypatch.setattr(doctor, "_reference", lambda: "fine")
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 0
    monkeypatch.setattr(doctor, "diagnose", lambda: iter([broken]))
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert "gone" in result.output


def test_versions_out_of_range_are_refused(monkeypatch):
    versions.check_versions()
    monkeypatch.setattr(versions, "SUPPORTED", {"transformers": "<5"})
    with pytest.raises(UnsupportedVersionError, match=f"transformers {version('transformers')} is"):
        versions.check_versions()
    monkeypatch.setattr(versions, "SUPPORTED", {"no-such-package": ">1"})
    with pytest.raises(UnsupportedVersionError, match="not installed"):
        versions.check_versions()


def test_supported_ranges_are_those_of_the_package():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    for name, supported in versions.SUPPORTED.items():
        assert ranges[name] == Requirement(name + supported).specifier


def test_families_are_those_of_the_adapters():
    from vispress.adapters.base import list_families

    assert [family.name for family in doctor.families()] == list_families()


@pytest.mark.parametrize("name", ["quickstart", "new_method"])
def test_examples_run(name, monkeypatch, capsys, request):
    from vispress import reference
    from vispress.reference.model.checkpoint import read

    folder = request.getfixturevalue("checkpoint")
    monkeypatch.setattr(reference, "load", lambda: read(folder))
    known = dict(registry._METHODS)
    try:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    finally:
        # an example's method must not show up in other tests
        registry._METHODS.clear()
        registry._METHODS.update(known)
    assert "visual tokens" in capsys.readouterr().out
