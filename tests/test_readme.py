"""The README says what the registry says, and its commands exist."""

import ast
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from benchmarks.speed_table import speed_markdown

import vispress
from vispress.errors import CompressionStateError
from vispress.listing import method_markdown
from vispress.reference import heldout, load

README = Path(__file__).parents[1] / "README.md"
TABLES = {"methods": method_markdown, "speed": speed_markdown}


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


def run(block: str, names: dict[str, Any]) -> int:
    """Run a block of Python statement by statement; gives how often it compressed the model.

    What is compressed is freed first, as the README says, and answers once.
    """
    count = 0
    for statement in ast.parse(block).body:
        code = ast.unparse(statement)
        compresses = "compress_model(" in code
        if compresses or "compressed(" in code:
            with suppress(CompressionStateError):
                vispress.remove_compression(names["model"])
        exec(code, names)
        if compresses:
            count += 1
            names["model"].generate(**names["inputs"], max_new_tokens=1)
    return count


@pytest.mark.slow
def test_its_python_runs_on_the_model_that_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(README.parent)
    model, processor = load()
    image, prompt, _, _ = heldout("attribute", 1)[0]
    inputs = processor(images=[image], text=[prompt], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    labels = inputs["input_ids"].clone()
    labels[:, : length - 1] = -100
    names = {"model": model, "inputs": inputs, "labels": labels, "length": length - 1}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) > 3
    # torchao is no package of ours: tests/integrations compress int8 models
    assert sum(run(block, names) for block in blocks if "torchao" not in block) > 10


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
