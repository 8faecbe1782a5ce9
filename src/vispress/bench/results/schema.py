"""Plain data against a declared shape: the first thing that does not fit, by its place and rule.

A shape is a function of a value and the place where it stands; the functions here make shapes, and
shapes of shapes.
"""

import math
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

Shape = Callable[[Any, str], str | None]
"""`shape(value, place)`: what is wrong there, or None."""

_Where = tuple[str | int, ...]

DEEPEST: Final = 32
"""Levels of lists and mappings in each other; far fewer are ever written."""
_WIDEST: Final = 2**63  # of whole numbers


def number(*, low: float = -math.inf, high: float = math.inf, above: float = -math.inf) -> Shape:
    """A finite number, no bool.

    Args:
        low: The least.
        high: The greatest.
        above: What it must be greater than.
    """
    rule = "a number" + _range(low, high, above)

    def fits(value: Any) -> bool:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        most = sys.float_info.max  # an int beyond it is no float; NaN is never within
        return real and -most <= value <= most and low <= value <= high and value > above

    return _rule(fits, rule)


def whole(*, low: int = 0) -> Shape:
    """An integer of 64 bits, no bool."""

    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value < _WIDEST

    return _rule(fits, "a whole number" + _range(low, math.inf, -math.inf))


def text(pattern: str = r"(?s).+", words: str = "text that is not empty") -> Shape:
    """Text that a regular expression matches as a whole.

    Args:
        pattern: The expression.
        words: What it says.
    """
    compiled = re.compile(pattern)
    return _rule(lambda value: isinstance(value, str) and compiled.fullmatch(value), words)


def flag() -> Shape:
    """True or false."""
    return _rule(lambda value: isinstance(value, bool), "true or false")


def choice(*known: str) -> Shape:
    """One of some words."""
    words = ", ".join(map(repr, known))
    return _rule(lambda value: isinstance(value, str) and value in known, f"one of {words}")


def nullable(shape: Shape) -> Shape:
    """Null, or what another shape asks for."""
    return lambda value, place: None if value is None else shape(value, place)


def either(first: Shape, second: Shape) -> Shape:
    """What one of two shapes asks for; the second one says what is wrong."""
    return lambda value, place: first(value, place) and second(value, place)


def strings() -> Shape:
    """A list of any text; thousands of answers in no time."""
    slow = items(_rule(lambda value: isinstance(value, str), "text"))
    return lambda value, place: None if _joined(value) is not None else slow(value, place)


def items(shape: Shape, *, least: int = 0) -> Shape:
    """A list of what another shape asks for.

    Args:
        shape: Of each.
        least: How many there must be.
    """

    def check(value: Any, place: str) -> str | None:
        if not isinstance(value, list) or len(value) < least:
            return _wrong(place, f"a list of at least {least}" if least else "a list", value)
        found = (shape(one, f"{place}[{i}]") for i, one in enumerate(value))
        return next((fault for fault in found if fault is not None), None)

    return check


def table(shape: Shape) -> Shape:
    """A mapping with any names, to what another shape asks for."""

    def check(value: Any, place: str) -> str | None:
        if not isinstance(value, dict):
            return _wrong(place, "a mapping", value)
        found = (shape(one, _inside(place, name)) for name, one in value.items())
        return next((fault for fault in found if fault is not None), None)

    return check


def record(required: Mapping[str, Shape], optional: Mapping[str, Shape] | None = None) -> Shape:
    """A mapping with these names and no others.

    Args:
        required: What must be there.
        optional: What may be.
    """
    known = {**required, **(optional or {})}

    def check(value: Any, place: str) -> str | None:
        if not isinstance(value, dict):
            return _wrong(place, "a mapping", value)
        for name in required:
            if name not in value:
                return f"{_inside(place, name)} is missing"
        for name, one in value.items():
            if name not in known:
                return f"{_inside(place, name)} is not known; known: {', '.join(known)}"
            if (fault := known[name](one, _inside(place, name))) is not None:
                return fault
        return None

    return check


def anything(value: Any, place: str) -> None:
    """A shape that everything has."""


def plain_fault(data: Any) -> str | None:
    """What of some data could not be stored as JSON, compared, printed and read again.

    Shapes go only as deep as they are declared; this looks at everything, without recursion.
    """
    rest: list[tuple[Any, _Where]] = [(data, ())]
    while rest:
        value, where = rest.pop()
        if isinstance(value, dict | list):
            # what is most of a file, answers in ASCII, is seen at once
            if (_joined(value) or "\xff").isascii():
                continue
            if len(where) >= DEEPEST:
                return f"{_place(where)[:80]}... is nested deeper than {DEEPEST} levels"
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, one in pairs:
                rest.append((one, (*where, key)))
                if isinstance(key, str) and (rule := _leaf_rule(key)) is not None:
                    return _wrong(f"a name in {_place(where)}", rule, key)
        elif (rule := _leaf_rule(value)) is not None:
            return _wrong(_place(where), rule, value)
    return None


def _place(where: _Where) -> str:
    place = ""
    for key in where:
        place = _inside(place, key)
    return place


def _joined(value: Any) -> str | None:
    """All of a list of texts; None where it is none."""
    try:
        return "".join(value) if isinstance(value, list) else None
    except TypeError:
        return None


def _leaf_rule(value: Any) -> str | None:
    """The rule that a value without parts breaks."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        # half of a surrogate pair: no encoding has it
        broken = not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value)
        return "text in Unicode" if broken else None
    if isinstance(value, int):
        return None if -_WIDEST <= value < _WIDEST else "a whole number of 64 bits"
    if isinstance(value, float):
        return None if math.isfinite(value) else "a finite number"
    return "plain data"


def _rule(fits: Callable[[Any], Any], words: str) -> Shape:
    return lambda value, place: None if fits(value) else _wrong(place, words, value)


def _range(low: float, high: float, above: float) -> str:
    if above > -math.inf:
        return f" in ({above:g}, {high:g}]" if high < math.inf else f" above {above:g}"
    if high < math.inf:
        return f" in [{low:g}, {high:g}]"
    return f" of at least {low:g}" if low > -math.inf else ""


def _inside(place: str, key: str | int) -> str:
    if isinstance(key, int):
        return f"{place}[{key}]"
    return f"{place}.{key}" if place else str(key)


def _wrong(place: str, rule: str, value: Any) -> str:
    # a number too long to be printed is an error of its own
    big = isinstance(value, int) and abs(value) >= _WIDEST
    return f"{place or 'it'} must be {rule}, got {'a longer one' if big else reprlib.repr(value)}"
