"""Tables for terminals: at any width no name and no interval is cut."""

import io

import pytest
from rich.console import Console
from tests.bench.stored import write_results

from vispress.bench.results.sheet import Sheet
from vispress.bench.results.summary import summarise
from vispress.bench.results.table import tables


def printed(what, width):
    """What stands on a terminal of that width."""
    console = Console(file=io.StringIO(), width=width)
    console.print(what)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    groups = {"sparsevlm_plus": 0.8, "quadtree_merge": 0.5, "random": 0.6}
    return summarise(write_results(tmp_path_factory.mktemp("r") / "r", groups, questions=40))


@pytest.mark.parametrize("width", [60, 80, 140])
def test_nothing_is_cut(summary, width):
    text = printed(tables(summary), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    narrow = {word for word in text.split() if "-" in word and word[0].isdigit()}
    wide = printed(tables(summary), 400).split()
    assert {word for word in wide if "-" in word and word[0].isdigit()} == narrow


def test_what_does_not_fit_goes_on_below_with_its_names():
    sheet = Sheet(title="a", caption="b", columns=("method", "first one", "second"))
    sheet.add_row("x", "1", "22222222")
    lines = printed(sheet, 22).split("\n")
    assert [line.split() for line in lines if line.strip().startswith("x")] == [
        ["x", "1"],
        ["x", "22222222"],
    ]
    assert "a, continued" in "".join(lines)
    assert "a, continued" not in printed(sheet, 60)
