"""The README says what the registry says, and its commands exist."""

import re
from pathlib import Path

import pytest

from vispress.listing import method_markdown

README = Path(__file__).parents[1] / "README.md"
TABLE = re.compile(r"(<!-- methods: .*? -->\n)(.*?)(\n<!-- /methods -->)", re.DOTALL)


def test_the_method_table_is_the_registrys() -> None:
    found = TABLE.search(README.read_text(encoding="utf-8"))
    assert found is not None
    assert found[2] == method_markdown(), "run `python -m tests.test_readme` to write it again"


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)`", README.read_text(encoding="utf-8")):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_number_of_the_results_section_has_its_file() -> None:
    for path in re.findall(r"\]\((benchmarks/[^)]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / path).exists(), path


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
    ],
)
def test_the_table_names_every_place_where_a_method_acts(name: str, where: str) -> None:
    row = next(line for line in method_markdown().splitlines() if line.startswith(f"| `{name}` |"))
    assert where in [cell.strip() for cell in row.split("|")]


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(TABLE.sub(lambda m: m[1] + method_markdown() + m[3], text), encoding="utf-8")
