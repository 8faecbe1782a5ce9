"""What pytest runs by default, with `--quick`, with `-m full`, and by node id."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import evenly
from tests.conftest import pytest_collection_modifyitems as choose
from tests.conftest import pytest_generate_tests as generate


class Item:
    """What the choice sees of a collected test."""

    def __init__(self, name: str, case: int, *marks: pytest.MarkDecorator) -> None:
        self.nodeid = f"tests/some/test_some.py::{name}[{case}]"
        self.name, self.marks = name, {mark.name: mark.mark for mark in marks}

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self.marks.get(name)

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks[mark.name] = mark.mark


TESTS = ("fast", "thinned", "slow", "slow_with_more", "some")
SLOW = pytest.mark.slow, pytest.mark.slow(cases=3)


def collected() -> list[Item]:
    """Three, two, four, four and six cases."""
    items = [Item("fast", case) for case in range(3)]
    items += [Item("thinned", 0), Item("thinned", 1, pytest.mark.full)]
    items += [Item("slow", case, SLOW[0]) for case in range(4)]
    items += [Item("slow_with_more", case, SLOW[1]) for case in range(4)]
    return items + [Item("some", case, pytest.mark.some(cases=3)) for case in range(6)]


def run(*args: str, marks: str = "", quick: bool = False, by_default: bool = False) -> list[Item]:
    """What stays of the tests, those that pytest's own `-m` leaves out among them."""
    gone: list[Any] = []
    option = SimpleNamespace(markexpr=marks, quick=quick, by_default=by_default)
    hook = SimpleNamespace(pytest_deselected=lambda items: gone.extend(items))
    items: list[Any] = collected()
    before = len(items)
    choose(SimpleNamespace(option=option, args=args, hook=hook), items)  # type: ignore[arg-type]
    assert len(items) + len(gone) == before
    return items


def counts(items: list[Item]) -> tuple[int, ...]:
    return tuple(sum(item.name == name for item in items) for name in TESTS)


def test_by_default_what_is_full_and_most_that_is_slow_is_left_out() -> None:
    assert counts(run()) == (3, 1, 1, 3, 3)
    assert counts(run(marks="not slow")) == (3, 1, 1, 3, 3)
    assert [item.nodeid for item in run()] == [item.nodeid for item in run()]


def test_some_cases_lie_evenly_among_all() -> None:
    places = [int(item.nodeid[-2]) for item in run() if item.name == "some"]
    assert sorted(place % 2 for place in places) in ([0, 0, 0], [1, 1, 1])


@pytest.mark.parametrize("count", [6, 12, 15, 21])
def test_some_cases_meet_the_values_of_each_parameter_alike(count: int) -> None:
    """Every second of these cases is on the left, every third of three: steps of an even length
    would leave the others out.
    """
    values = {"family": "abc", "padding": ("left", "right"), "size": (1, 2, 3, 4, 5)}
    cases = [dict(zip(values, one, strict=True)) for one in product(*values.values())]
    items: Any = [SimpleNamespace(callspec=SimpleNamespace(params=case)) for case in cases]
    for first in range(len(cases)):
        chosen = [item.callspec.params for item in evenly(items, count, first)]
        assert len({tuple(case.values()) for case in chosen}) == count
        for name, found in values.items():
            times = [sum(case[name] == value for case in chosen) for value in found]
            assert max(times) - min(times) <= 2, (name, times)
            assert min(times) >= 1


def test_quick_runs_one_case_of_each_and_no_slow_one() -> None:
    assert counts(run(quick=True)) == (1, 1, 0, 0, 1)


@pytest.mark.parametrize("marks", ["full", "full and not slow"])
def test_full_runs_everything(marks: str) -> None:
    items = run(marks=marks)
    assert counts(items) == (3, 2, 4, 4, 6)
    assert all("full" in item.marks for item in items)  # as pytest's own `-m full` asks


def test_what_is_named_runs_whatever_it_is() -> None:
    name = "tests/some/test_some.py::"
    found = run(f"{name}thinned[1]", *(f"{name}slow[{case}]" for case in range(4)))
    assert counts(found) == (3, 2, 4, 3, 3)
    assert counts(run("tests/some/test_some.py")) == (3, 1, 1, 3, 3)
    assert counts(run(f"{name}thinned[1]", by_default=True)) == (3, 1, 1, 3, 3)


def generated(values: list[Any], *args: str, marks: str = "", **kwargs: Any) -> list[Any]:
    """Parameters of which pytest makes items."""
    option, found = SimpleNamespace(markexpr=marks, by_default=False), list[Any]()
    metafunc = SimpleNamespace(
        config=SimpleNamespace(option=option, args=args),
        parametrize=lambda names, values, **kwargs: found.extend(values),
    )
    generate(metafunc)  # type: ignore[arg-type]
    metafunc.parametrize("value", values, **kwargs)
    return found


def test_no_items_are_made_of_parameters_that_nobody_asks_for() -> None:
    full = pytest.param("c", marks=pytest.mark.full)
    values = ["a", pytest.param("b", marks=pytest.mark.some(cases=1)), full]
    assert generated(values) == values[:2]
    assert generated(values, marks="not slow") == values[:2]
    assert generated(values, marks="full and not slow") == values
    assert generated(values, "tests/some/test_some.py::test[c]") == values
    assert generated([full]) == [full]  # left out as an item: a test of no cases would be skipped


def test_an_id_that_tells_a_place_stays_what_it_is() -> None:
    class Made:
        """What pytest names by its place among all."""

    values = [pytest.param(Made(), marks=pytest.mark.full), Made()]
    assert generated(values) == values
    assert generated(values, ids=["one", "two"]) == values
    assert generated(values, ids=lambda made: "made") == values[1:]
    assert generated([values[0], pytest.param(values[1], id="named")])[0].id == "named"
