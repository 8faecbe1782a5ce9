"""What laws run over by default misses no way, no method and no layout."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from tests.laws import selection
from tests.laws.cases import CASES, DROPPING, FAMILIES, METHODS, make, on_videos
from tests.laws.selection import (
    Case,
    cases,
    chosen,
    computes,
    kin,
    laws_in_a_row,
    layouts,
    signals,
    way,
    ways,
)

from vispress.kinds import Signal

LAWS = (*range(1, 11), 12, 14, 15)
"""Those whose first test runs over cases that are chosen."""
OWN_CODE = {(f, m) for f, m in CASES if f in kin() and computes(f) & signals(f, m)}
"""Cases on kin whose adapter computes something that the method reads by code of its own."""
PRODUCTS = {"pictures": CASES, "dropping": DROPPING, "videos": on_videos()}


def families_of(found: Sequence[Case], methods: Sequence[str]) -> set[str]:
    """Families that one of the methods meets."""
    return {family for family, method in found if method in methods}


def assert_every_way_on_every_layout(found: Sequence[Case], among: Sequence[Case]) -> None:
    for methods in ways({method for _, method in among}).values():
        there, met = families_of(among, methods), families_of(found, methods)
        assert there & set(layouts()) <= met
        assert (there & set(kin()) != set()) == (met & set(kin()) != set())


@pytest.mark.parametrize("product", PRODUCTS)
def test_law_1_meets_every_method_and_every_way_on_every_layout(product: str) -> None:
    among = PRODUCTS[product]
    found = sorted(chosen(1, among))
    assert set(found) <= set(among)
    assert {method for _, method in found} == {method for _, method in among}
    assert_every_way_on_every_layout(found, among)


def test_law_1_meets_all_that_the_adapter_computes_itself() -> None:
    assert chosen(1) >= OWN_CODE


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("law", LAWS[1:])
def test_another_law_meets_every_way_once(law: int, product: str) -> None:
    among = PRODUCTS[product]
    found = sorted(chosen(law, among))
    assert set(found) <= set(among)
    assert {way(method) for _, method in found} == {way(method) for _, method in among}
    beyond = len(found) - len(ways({method for _, method in among}))
    assert 0 <= beyond <= len(OWN_CODE) / laws_in_a_row()


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("first", [2, 3, 9, 14])
def test_laws_in_a_row_meet_every_way_on_every_layout(first: int, product: str) -> None:
    among = PRODUCTS[product]
    found = set().union(*(chosen(law, among) for law in range(first, first + laws_in_a_row())))
    assert_every_way_on_every_layout(sorted(found), among)


@pytest.mark.parametrize("product", PRODUCTS)
def test_several_laws_meet_each_method(product: str) -> None:
    among = PRODUCTS[product]
    met = Counter(method for law in LAWS for method in {m for _, m in chosen(law, among)})
    assert set(met) == {method for _, method in among}
    for methods in ways(met).values():  # law 1 meets each of them, the others deal them out in turn
        dealt = (len(LAWS) - 1) // len(methods)
        floor = 2 if product == "videos" else min(3, 1 + dealt)
        assert min(met[method] for method in methods) >= floor >= 2


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_test_beside_meets_every_fourth_way_once(product: str) -> None:
    among = PRODUCTS[product]
    methods = {method for _, method in among}
    found = [chosen(f"name {number}", among) for number in range(480)]
    for each in found:
        assert each <= set(among)
        assert len({way(m) for _, m in each}) == len(each)
        assert abs(len(each) - len(ways(methods)) / selection.BESIDE) <= 1
    assert len({frozenset(each) for each in found}) > 40
    assert {method for each in found for _, method in each} == methods


@pytest.mark.parametrize("product", PRODUCTS)
def test_over_all_laws_every_way_meets_every_layout_twice_and_kin_twice(product: str) -> None:
    among = PRODUCTS[product]

    def place(family: str) -> str:
        return family if family in layouts() else "kin"

    met = Counter((place(family), way(m)) for law in LAWS for family, m in chosen(law, among))
    assert min(met[place(family), way(method)] for family, method in among) >= 2


def test_another_method_of_a_known_way_costs_law_1_alone() -> None:
    """What grows with the number of methods is no law's cost but that of the first."""
    joined = next(methods for methods in ways().values() if len(methods) > 1)
    fewer = [case for case in CASES if case[1] != joined[-1]]
    own = len(OWN_CODE) / laws_in_a_row()
    assert abs(len(chosen(2)) - len(chosen(2, fewer))) <= own
    assert len(chosen("a name")) == len(chosen("a name", fewer))
    assert chosen(1) > chosen(1, fewer) or len(chosen(1)) > len(chosen(1, fewer))


@pytest.mark.parametrize("first", [2, 5, 14])
def test_laws_in_a_row_meet_all_code_of_adapters_of_their_own(first: int) -> None:
    some = range(first, first + laws_in_a_row())
    seen = set().union(*(chosen(law) for law in some))

    def computed(cases: set[Case]) -> set[tuple[str, frozenset[Signal]]]:
        return {(f, own) for f, m in cases if (own := computes(f) & signals(f, m)) and f in kin()}

    assert computed(seen) == computed(OWN_CODE)


@pytest.mark.parametrize("law", [1, 4, "by name"])
def test_full_is_the_whole_product(law: int | str) -> None:
    parameters = cases(law)
    assert [tuple(one.values) for one in parameters] == CASES
    marks = {tuple(one.values): [mark.name for mark in one.marks] for one in parameters}
    assert {case for case, names in marks.items() if names != ["full"]} == chosen(law)
    once = chosen(law, once=law == 1)
    assert {case for case, names in marks.items() if not names} == once
    beyond = {"layouts"} if law == 1 else set()
    assert {name for names in marks.values() for name in names} == {"full"} | beyond


def test_laws_differ_in_what_they_choose() -> None:
    assert len({frozenset(chosen(law)) for law in LAWS}) == len(LAWS)


def test_layouts_have_every_feature_and_kin_none_of_their_own() -> None:
    covered = frozenset().union(*(selection.features(family) for family in layouts()))
    assert all(selection.features(family) <= covered for family in FAMILIES)
    assert set(layouts()) | set(kin()) == set(FAMILIES)
    assert not set(layouts()) & set(kin())
    assert len(layouts()) > 1


def test_ways_tell_paths_apart_and_join_equal_ones() -> None:
    assert way("random") == way("uniform")
    assert way("fastv") != way("pyramiddrop")  # attention of the layer before, or ahead
    assert len({way(m) for m in ("avg_pool", "visionzip", "quadtree_merge", "divprune")}) == 4
    joined = [name for name in METHODS if len(ways()[way(name)]) > 1]
    assert len(ways()) < len(METHODS)
    assert joined


def test_a_field_that_placements_get_later_is_a_trait() -> None:
    (placement,) = make("llava", "fastv").placements(6)
    plain = selection._of_placement(placement)
    assert selection._of_placement(replace(placement, until=4)) == plain | {"until"}
    assert selection._of_placement(replace(placement, images="last")) == plain | {"images=last"}


def test_code_of_its_own_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that finds padding by other code has that signal met."""
    family = kin()[0]
    assert Signal.PADDING not in computes(family)
    adapter = type(selection.find_adapter(selection.model_of(family)))
    monkeypatch.setattr(adapter, "padding", lambda self, pixels: pixels, raising=False)
    computes.cache_clear()
    try:
        assert Signal.PADDING in computes(family)
    finally:
        computes.cache_clear()
