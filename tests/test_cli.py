"""The command line: what it prints, and one line and exit code 2 for every expected error."""

import json
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

import vispress
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


def run_app(*arguments, columns=80):
    """What `vispress ARGUMENTS` prints on a terminal of that width."""
    result = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.output
    return result.output


def test_methods_is_a_short_list_for_80_columns():
    output = run_app("methods")
    assert [name for name in registry.list_methods() if f"  {name} " not in output] == []
    assert "…" not in output
    assert max(map(len, output.splitlines())) <= 80
    assert len(output.splitlines()) < 3 * len(registry.list_methods())


@pytest.mark.parametrize("name", ["fastervlm", "debias", "dycoke"])
def test_methods_of_a_name_tells_all_about_it(name):
    output = run_app("methods", name)
    cls = registry.get_method(name)
    words = " ".join(output.split())
    for said in (cls.paper, cls.summary, f'config="{name}"', "keep_ratio = None"):
        assert said in words
    assert max(map(len, output.splitlines())) <= 80
    # LLaVA-NeXT-Video, a family, is shown pictures, too
    assert ("video" in words.replace("llava_next_video", "")) == (name == "dycoke")


def test_methods_of_a_model_say_why_not():
    family = " ".join(run_app("methods", "--model", "qwen2_vl").split())
    assert "vtc_cls its encoder has no [CLS] token; scores='column_mean'" in family
    model = " ".join(run_app("methods", "--model", "reference").split())
    assert "not on reference" in model
    assert "dycoke is made for video input, but llava reads no videos." in model
    assert "fastervlm prunes; keeps" in model  # its encoder has a [CLS] token


def test_methods_are_json_for_programs():
    every = json.loads(run_app("methods", "--json", "--model", "reference-qwen"))
    assert [one["name"] for one in every] == registry.list_methods()
    refused = {one["name"]: one["refused"] for one in every}
    assert refused["divprune"] is None
    assert "[CLS]" in refused["vscan"]
    one = json.loads(run_app("methods", "fastv", "--json"))
    assert {"name": "layer", "default": "None"}.items() <= one["settings"][0].items()


def test_the_version_is_told():
    assert run_app("--version").strip() == f"vispress {vispress.__version__}"


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
        (["search", "gready"], "strategy must be one of 'greedy', 'sigmoid', 'withdrawal'"),
        (["search", "withdrawal", "--keep-ratio", "0.5"], "a withdrawal search takes no budget"),
        (["search", "withdrawal", "--method", "fastv"], "withdrawal searches the layer of vtw"),
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
    monkeypatch.setattr(cli_options, "BENCH", ("no_such_package",))
    assert run_main(monkeypatch, *command) == 2
    assert "pip install 'vispress[bench]'" in capsys.readouterr().err


WRONG = (
    "bench nowhere",
    "bench smoke --model nowhere",
    "bench smoke --questions 0",
    "show scene:1 --method fastvv",
    "show none.png --method fastv --question what",
    "show scene:1 --method fastv --keep-ratio 2",
    "search greedy --method fastvv",
    "fit-debias --method fastvv",
    "train-compressor --model nowhere",
    "probe arank --model nowhere",
)


def test_wrong_arguments_are_refused_before_anything_heavy_is_imported():
    code = (
        "import sys\nfrom vispress import cli\n"
        f"for words in {WRONG!r}:\n"
        "    sys.argv = ['vispress', *words.split()]\n"
        "    try:\n        cli.main()\n"
        "    except SystemExit as end:\n"
        "        print(end.code, words, [m for m in ('torch', 'numpy') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"2 {words} []" for words in WRONG]
    assert done.stderr.count("error: ") == len(WRONG)


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


@pytest.mark.slow
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
    assert run_main(monkeypatch, "search", "withdrawal", *arguments, "--tolerance", "9") == 0
    assert load_config(out / "schedule.yaml").layer == 1
    assert "withdrawal, tolerance 9: reverse_kl" in (out / "schedule.yaml").read_text()


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
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 0
    monkeypatch.setattr(doctor, "diagnose", lambda: iter([broken]))
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert "gone" in result.output


def test_doctor_looks_at_the_checkpoint_and_at_what_reads_it(monkeypatch, tmp_path):
    from vispress.reference import folders

    def found():
        return next(check for check in doctor.diagnose() if check.name == "reference checkpoint")

    assert found().status == "ok"
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    monkeypatch.setattr(folders, "SHIPPED", tmp_path)
    assert found().status == "broken"
    monkeypatch.setattr(doctor, "PICTURES", ("no_such_package",))
    assert found().status == "missing"
    assert "pip install 'vispress[bench]'" in found().detail
    missing = found()
    monkeypatch.setattr(doctor, "diagnose", lambda: iter([missing]))
    # brackets are no markup
    output = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "200"}).output
    assert "'vispress[bench]'" in output
    (told,) = json.loads(CliRunner().invoke(cli.app, ["doctor", "--json"]).output)
    assert told["status"] == "missing"


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


@pytest.mark.parametrize("name", ["quickstart", "new_method", "new_model"])
def test_examples_run(name, monkeypatch, capsys, request):
    from vispress import reference
    from vispress.adapters.registry import _ADAPTERS
    from vispress.reference.model.checkpoint import read

    folder = request.getfixturevalue("checkpoint")
    monkeypatch.setattr(reference, "load", lambda: read(folder))
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    known, adapters = dict(registry._METHODS), dict(_ADAPTERS)
    try:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    finally:
        # what an example registers must not show up in other tests
        for table, before in ((registry._METHODS, known), (_ADAPTERS, adapters)):
            table.clear()
            table.update(before)
        sys.modules.pop("common", None)
    assert "visual tokens" in capsys.readouterr().out
