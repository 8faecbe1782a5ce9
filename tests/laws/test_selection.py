"""What laws run over by default misses no way, no method and no layout."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from tests.laws import selection
from tests.laws.cases import CASES, DROPPING, FAMILIES, METHODS, make, on_videos
from tests.laws.selection import Case, cases, chosen, computes, kin, layouts, way, ways

from vispress.kinds import Signal

LAWS = range(1, 17)
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
@pytest.mark.parametrize("law", LAWS)
def test_a_law_meets_every_method(law: int, product: str) -> None:
    among = PRODUCTS[product]
    found = sorted(chosen(law, among))
    assert set(found) <= set(among)
    assert {method for _, method in found} == {method for _, method in among}


@pytest.mark.parametrize("product", PRODUCTS)
def test_law_1_meets_every_way_on_every_layout(product: str) -> None:
    among = PRODUCTS[product]
    assert_every_way_on_every_layout(sorted(chosen(1, among)), among)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("first", [1, 2, 3, 9, 14])
def test_laws_in_a_row_meet_every_way_on_every_layout(first: int, product: str) -> None:
    among = PRODUCTS[product]
    some = range(first, first + selection.SPREAD)
    found = set().union(*(chosen(law, among) for law in some))
    assert_every_way_on_every_layout(sorted(found), among)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_test_beside_meets_every_second_way_once(product: str) -> None:
    among = PRODUCTS[product]
    methods = {method for _, method in among}
    found = [chosen(f"name {number}", among) for number in range(40)]
    for each in found:
        assert each <= set(among)
        assert len({way(m) for _, m in each}) == len(each)
        assert abs(len(each) - len(ways(methods)) / 2) <= 1
    assert len({frozenset(each) for each in found}) > len(found) / 2
    assert {method for each in found for _, method in each} == methods


@pytest.mark.parametrize("product", PRODUCTS)
def test_over_all_laws_every_method_meets_every_family(product: str) -> None:
    among = PRODUCTS[product]
    seen = set().union(*(chosen(law, among) for law in LAWS))
    assert seen == set(among)


@pytest.mark.parametrize("first", [1, 5, 14])
def test_laws_in_a_row_meet_what_the_adapter_computes_itself(first: int) -> None:
    some = range(first, first + selection.SPREAD)
    seen = set().union(*(chosen(law) for law in some))
    own = {(f, m) for f, m in CASES if f in kin() and computes(f) & make(f, m).signals()}
    assert own <= seen


@pytest.mark.parametrize("law", [1, "by name"])
def test_full_is_the_whole_product(law: int | str) -> None:
    parameters = cases(law)
    assert [tuple(one.values) for one in parameters] == CASES
    marks = {tuple(one.values): [mark.name for mark in one.marks] for one in parameters}
    assert {case for case, names in marks.items() if names != ["full"]} == chosen(law)
    once = chosen(law, once=isinstance(law, int))
    assert {case for case, names in marks.items() if not names} == once
    beyond = {"layouts"} if isinstance(law, int) else set()
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
