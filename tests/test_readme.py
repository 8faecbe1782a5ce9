"""The README says what the registry says, and its commands exist."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.speed_table import speed_markdown

import vispress
from vispress import cli
from vispress.listing import family_markdown, method_markdown
from vispress.registry import list_methods

README = Path(__file__).parents[1] / "README.md"
TABLES = {"families": family_markdown, "speed": speed_markdown}


def table_of(name: str) -> re.Pattern[str]:
    """What stands between a table's marks."""
    return re.compile(rf"(<!-- {name}: .*? -->\n)(.*?)(<!-- /{name} -->)", re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_registry_and_results(name: str) -> None:
    found = table_of(name).search(README.read_text(encoding="utf-8"))
    assert found is not None
    written = TABLES[name]() + "\n"
    assert found[2] == written, "run `python -m tests.test_readme` to write it again"


def test_what_was_not_measured_is_not_in_the_speed_table() -> None:
    rows = [{"model": "llava_1_5_7b", "batch": 1, "method": "fastv", "error": "out of memory"}]
    assert len(speed_markdown(rows).splitlines()) == 2


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)`", README.read_text(encoding="utf-8")):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_number_of_the_results_section_has_its_file() -> None:
    for path in re.findall(r"\]\((benchmarks/[^)]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / path).exists(), path


def blocks_of(language: str) -> list[str]:
    text = README.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
def test_its_python_runs_word_for_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *more = blocks_of("python")
    assert more
    names: dict[str, Any] = {}
    exec(first, names)
    assert "visual tokens" in capsys.readouterr().out
    for block in more:
        exec(block, names)
    vispress.remove_compression(names["model"])


LONG = ("bench", "report")
"""Commands that take most of a minute."""


@pytest.mark.slow
@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.full)])
def test_its_commands_run_word_for_word(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, all_of_them: bool
) -> None:
    """What is to be typed, one after another, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks_of("bash") for line in block.splitlines()]
    typed = [shlex.split(line) for line in lines if line.startswith("vispress ")]
    assert len(typed) > 4
    for words in typed:
        if words[1] in LONG and not all_of_them:
            continue
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not caught.value.code, words
    made = ("results/report.html", "results/frontier.png") if all_of_them else ()
    for file in ("kept.png", *made):
        assert (tmp_path / file).is_file()


def test_its_first_screen_is_short_and_its_numbers_are_those_of_files() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    assert f"{len(list_methods())} methods and controls" in text
    fastest = [row for row in speed_markdown().splitlines() if "DivPrune" in row]
    told = (("LLaVA-1.5-7B | 32", "593 to 126"), ("LLaVA-NeXT-7B | 8", "716 to 114"))
    for case, times in told:
        (row,) = [row for row in fastest if f"{case} |" in row]
        assert times in row


@pytest.mark.parametrize("name", ["fastv", "random"])
def test_the_table_has_a_row_for(name: str) -> None:
    assert f"| `{name}` |" in method_markdown()


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("pyramiddrop", "before layer 8, 16, 24 of 32"),
        ("catp", "before the LLM; before layer 7, 8 of 32"),
        ("framefusion", "before the LLM; before layer 1 to 9 of 32"),
        ("lvlm_csp", "around layers 0 to 7; before layer 16 of 32"),
        ("pmod", "around each of layers 8 to 31 of 32"),
    ],
)
def test_the_table_names_every_place_where_a_method_acts(name: str, where: str) -> None:
    row = next(line for line in method_markdown().splitlines() if line.startswith(f"| `{name}` |"))
    assert where in [cell.strip() for cell in row.split("|")]


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    for name, write in TABLES.items():
        text = table_of(name).sub(lambda m, write=write: m[1] + write() + "\n" + m[3], text)
    README.write_text(text, encoding="utf-8")
