"""Every file of `examples/` runs, at few steps, and says what its docstring promises."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from vispress import registry

EXAMPLES = Path(__file__).parents[1] / "examples"
RUN = {
    "lora_trainer": (
        ["--steps", "2", "--test", "2", "--scenes", "16"],
        r"compressed, untrained: \d+%\n.*'mean_keep_ratio': '0\.\d+.*compressed, trained: \d+%",
    ),
    "packed_sft": (
        ["--steps", "2", "--test", "2", "--documents", "3"],
        r"of each picture \[9, 9, 9\] went on\ntrained: \d+%",
    ),
    "train_compressor": (
        ["--steps", "2", "--test", "2", "--scenes", "16"],
        r"loaded from selector: the same",
    ),
    "video": (["--clips", "1"], r"vidcom2: \['\w+'\]\n  58 of 384, by step: \[\d+(, \d+)+\]"),
    "schedule_search": (["--questions", "2"], r"method: layerwise\n.*with the schedule: \d+%"),
    "bench_own_method": (["--questions", "2"], r"far_from_mean.*random"),
    "accelerate_loop": (["--steps", "2"], r"step 0: loss \d.*routers: pmod"),
}
"""Options that make it short, and what is said."""
ELSEWHERE = {
    "common": "what the others share",
    "quickstart": "tests/test_cli.py",
    "new_method": "tests/test_cli.py",
    "lmms_eval_run": "tests/integrations/test_lmms_eval.py",
    "serve_vllm": "tests/serving/test_example.py",
    "new_model": "tests/test_cli.py",
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= {*RUN, *ELSEWHERE}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_it_is_short_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    if path.stem != "common":
        assert f"examples/{path.name}" in text.split('"""')[1]


@pytest.mark.slow(cases=len(RUN))
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", RUN)
def test_it_runs(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    arguments, said = RUN[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    registry.list_methods()  # loads ours: what an example adds goes again
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    monkeypatch.delitem(sys.modules, "common", raising=False)
    found = capfd.readouterr().out
    assert re.search(said, found, re.DOTALL), found
