"""Cases that a law runs over by default: worked out of compressors and adapters, none typed.

A *way* is what distinguishes a compressor's path through the runtime. A family *stands for a
layout* when its adapter has a feature that no family chosen before it has; the others are its
*kin*. By default

* law 1, which the others stand on, meets every method, every way on every layout and on one of the
  kin, and every method on kin whose adapter computes its signals with code of its own;
* any other numbered law meets every way once, on a family and by a method that change from law to
  law: as many laws in a row as a way has places (one a layout, one for the kin) meet them all, and
  so do they what kin compute with code of their own. The laws together meet every method several
  times;
* a test beside a law's first one has a name instead of a number, and meets every fourth way once,
  by a method and on a family that change from name to name.

So a law costs more with a new way and no more with another method of a known one, or with another
family. `-m "not layouts"` leaves every method once of law 1, for another version of transformers.
`pytest -m full` (`make full`) runs the whole product; a case that is asked for by its node id runs
in any case.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import cache
from inspect import signature
from typing import Any
from zlib import crc32

import pytest
from tests.laws.running import Spy
from tests.laws.table import (
    CASES,
    FAMILIES,
    GISTS,
    METHODS,
    VIDEO_ONLY,
    VIDEO_SAMPLES,
    fits,
    logits_of,
    make,
    model_of,
)
from tests.tiny import Image, Sample, Text, gist_tokens, make_inputs

from vispress import compressed
from vispress.adapters.base import ModelAdapter, find_adapter
from vispress.kinds import ATTENTION_SIGNALS, ENCODER_SIGNALS, Signal, Stage
from vispress.methods.base import Compressor
from vispress.types import Placement, TokenPlan

Case = tuple[str, str]
LAST = 18
"""The last law's number."""
BESIDE = 4
"""Among how many names in turn ways are dealt out."""

_BY_ADAPTER: dict[Signal, tuple[str, ...]] = {
    **dict.fromkeys(ATTENTION_SIGNALS | {Signal.VISION_KEYS}, ("pack", "encoder_attentions")),
    Signal.VISION_FEATURES: ("pack", "projector_inputs"),
    Signal.PROJECTOR: ("project", "two_layer"),
    Signal.ENCODER_GROUPS: ("sequences", "patch_order"),
    Signal.PADDING: ("padding",),
    Signal.GRID: ("layouts",),
    Signal.CROPS: ("layouts",),
}
"""Signals that adapters compute, and by which of their methods; the runtime computes the others."""


# --- ways


@cache
def way(method: str) -> frozenset[str]:
    """What distinguishes a method's path through the runtime."""
    family = next(family for family in FAMILIES if fits(family, method))
    compressor, model = make(family, method), model_of(family)
    placements = compressor.placements(len(find_adapter(model).decoder_layers))
    inside = [one for one in placements if one.stage is Stage.IN_LLM]
    found = {f"positions={compressor.default_positions}"}
    found |= {trait for placement in placements for trait in _of_placement(placement)}
    found |= {f"reads {signal}" for signal in compressor.signals() if signal not in _BY_ADAPTER}
    found |= {trait for plan in _plans(family, method) for trait in _of_plan(plan)}
    found |= {name for name in _parts() if getattr(compressor, name)() is not None}
    found |= {"views"} if compressor.views() else set()
    found |= {"layers"} if len(inside) > 1 else set()
    if compressor.signals() & ENCODER_SIGNALS:
        found |= {"reads the encoder" + (" late" if any(p.layer for p in placements) else "")}
    return frozenset(found)


def _of_placement(placement: Placement) -> set[str]:
    """The stage, what else is not as by default, and whether all, some or none are kept."""
    kept = placement.budget.resolve(1000)
    found = {f"stage={placement.stage}", {0: "keeps none", 1000: "keeps all"}.get(kept, "prunes")}
    for field in fields(placement):
        value = getattr(placement, field.name)
        if field.name in ("stage", "budget", "layer") or value == field.default:
            continue
        found.add(f"{field.name}={value}" if isinstance(value, str) else field.name)
    return found


def _of_plan(plan: TokenPlan) -> set[str]:
    found = {"ragged"} if isinstance(plan.keep, tuple) else set()
    found |= {f"merges {plan.merge_on}"} if plan.assign is not None else set()
    found |= {"replaces"} if plan.features is not None else set()
    return found | ({"remembers"} if plan.memory else set())


def _plans(family: str, method: str) -> list[TokenPlan]:
    """Plans of one prefill."""
    spy, model = Spy(), model_of(family)
    samples = VIDEO_SAMPLES[:1] if method in VIDEO_ONLY else [Sample([Text(3), Image(), Text(4)])]
    with compressed(model, spy.watch(make(family, method))), gist_tokens(int(method in GISTS)):
        logits_of(model, make_inputs(family, samples))
    return [plan for _, plan in spy.seen]


@cache
def _parts() -> tuple[str, ...]:
    """Methods by which a compressor says that it has a part of another kind, or None."""
    return tuple(
        name
        for name, value in vars(Compressor).items()
        if callable(value)
        and list(signature(value).parameters) == ["self"]
        and "None" in str(signature(value).return_annotation).split(" | ")[1:]
    )


def ways(methods: Iterable[str] = METHODS) -> dict[frozenset[str], list[str]]:
    """Methods by their way, in order."""
    found: dict[frozenset[str], list[str]] = {}
    for method in methods:
        found.setdefault(way(method), []).append(method)
    return found


# --- layouts


@cache
def features(family: str) -> frozenset[str]:
    """What an adapter has that asks for code of its own in the runtime or in methods."""
    adapter = find_adapter(model_of(family))
    has = {
        "three-axis positions": adapter.mrope,
        "packed encoder": adapter.packed,
        "[CLS]": adapter.has_cls,
        "encoder windows": len(adapter.global_layers()) < len(adapter.encoder_attentions()),
        "DeepStack": bool(adapter.encoder_taps()),
        "joined patches": adapter.patches_per_token() > 1,
        "padded squares": adapter.square_encoder() is not None,
    }
    return frozenset({name for name, value in has.items() if value} | adapter.kinds)


@cache
def layouts() -> tuple[str, ...]:
    """Families that stand for a layout: the one with most that is new comes first."""
    chosen: list[str] = []
    covered: set[str] = set()
    while True:
        new = {family: len(features(family) - covered) for family in FAMILIES}
        best = max(FAMILIES, key=new.__getitem__)
        if not new[best]:
            return tuple(family for family in FAMILIES if family in chosen)
        chosen.append(best)
        covered |= features(best)


def kin() -> tuple[str, ...]:
    """The other families."""
    return tuple(family for family in FAMILIES if family not in layouts())


@cache
def computes(family: str) -> frozenset[Signal]:
    """Signals that a family's adapter computes by code that no family with a layout runs."""
    own = type(find_adapter(model_of(family)))
    others = [type(find_adapter(model_of(other))) for other in layouts() if other != family]

    def differs(name: str) -> bool:
        return all(_code(own, name) is not _code(other, name) for other in others)

    return frozenset(s for s, names in _BY_ADAPTER.items() if any(map(differs, names)))


def _code(adapter: type[ModelAdapter], name: str) -> Callable[..., Any]:
    return getattr(adapter, name)  # type: ignore[no-any-return]


# --- the choice


def number(law: int | str) -> int:
    """Where a law's rotation stands: numbered laws follow each other."""
    return law if isinstance(law, int) else crc32(law.encode())


def chosen(law: int | str, among: Sequence[Case] = CASES, *, once: bool = False) -> set[Case]:
    """The cases that a law runs over by default (see the module), or every method once."""
    turn = number(law)
    if once:
        return _every_method(among, turn)
    of_ways = [tuple(case for case in among if case[1] in own) for own in _ways_of(among)]
    if isinstance(law, str):
        first = (turn >> 16) % BESIDE
        of_ways = of_ways[first::BESIDE] or of_ways
        return {
            _schedule(tuple(own), place)[turn % (LAST - 1)] for place, own in enumerate(of_ways)
        }
    if law != 1:
        found = {_schedule(own, place)[law - 2] for place, own in enumerate(of_ways)}
        own_code = _own_code(among)
        dealt = own_code[turn % laws_in_a_row() :: laws_in_a_row()]
        return found | {methods[turn % len(methods)] for methods in dealt}
    found = _every_method(among, turn)
    for place, own in enumerate(of_ways):
        for group in _places(own):
            _add_one(found, group, turn + place)
    return found | {case for methods in _own_code(among) for case in methods}


def laws_in_a_row() -> int:
    """How many numbered laws, one behind the other, meet every way on every layout."""
    return len(layouts()) + 1


def _every_method(among: Sequence[Case], turn: int) -> set[Case]:
    """Every method once."""
    by_method: dict[str, list[str]] = {}
    for family, method in among:
        by_method.setdefault(method, []).append(family)
    return {
        (families[(METHODS.index(method) + turn) % len(families)], method)
        for method, families in by_method.items()
    }


def _ways_of(among: Sequence[Case]) -> list[list[str]]:
    """Methods of each way that is among the cases."""
    there = {method for _, method in among}
    found = ([method for method in methods if method in there] for methods in ways().values())
    return [methods for methods in found if methods]


def _places(of_way: Sequence[Case]) -> list[list[Case]]:
    """Cases of a way by layout, those on kin behind; none is empty."""
    groups = [[case for case in of_way if case[0] == family] for family in layouts()]
    groups.append([case for case in of_way if case[0] in kin()])
    return [group for group in groups if group]


@cache
def _schedule(of_way: tuple[Case, ...], first: int) -> tuple[Case, ...]:
    """Cases of a way by law from 2 on: place after place, and there whom earlier laws met least."""
    groups, met, found = _places(of_way), Counter[object](), list[Case]()
    fits = Counter(method for _, method in of_way)
    for law in range(2, LAST + 1):
        group = groups[(first + law) % len(groups)]
        found.append(min(group, key=lambda case: (met[case[1]], fits[case[1]], met[case])))
        met.update([found[-1], found[-1][1]])
    return tuple(found)


def _own_code(among: Sequence[Case]) -> list[list[Case]]:
    """Cases on kin whose adapter computes what they read by code of its own, by what that is."""
    found: dict[tuple[str, frozenset[Signal]], list[Case]] = {}
    for family, method in among:
        if family in kin() and (own := computes(family) & signals(family, method)):
            found.setdefault((family, own), []).append((family, method))
    return list(found.values())


@cache
def signals(family: str, method: str) -> frozenset[Signal]:
    """What a method reads on a family."""
    return frozenset(make(family, method).signals())


def _add_one(found: set[Case], candidates: Sequence[Case], turn: int) -> None:
    """Add one of the candidates, unless one of them is there."""
    if candidates and not found & set(candidates):
        found.add(candidates[turn % len(candidates)])


def cases(
    law: int | str,
    among: Sequence[Case] = CASES,
    *,
    turning: Sequence[object] = (),
    every_method: bool = False,
) -> list[Any]:
    """Parameters `(family, method)` of a law's test; those left out by default are marked `full`.

    Those of law 1 that go beyond every method once are marked `layouts`.

    Args:
        law: Its number, or a name for a test beside a law's first one; both turn the rotation.
        among: The whole product.
        turning: Values of a third parameter, of which each case takes one by default, in turn.
        every_method: Whether every method is met once and that is all.
    """
    default, turn = chosen(law, among, once=every_method), number(law)
    once = chosen(law, among, once=True) if law == 1 else default
    found = []
    for place, case in enumerate(among):
        for other, value in enumerate(turning or [None]):
            left_out = case not in default or other != (place + turn) % max(len(turning), 1)
            values = (*case, value) if turning else case
            beyond = () if case in once else pytest.mark.layouts
            found.append(pytest.param(*values, marks=pytest.mark.full if left_out else beyond))
    return found
