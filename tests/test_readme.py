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


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(TABLE.sub(lambda m: m[1] + method_markdown() + m[3], text), encoding="utf-8")
