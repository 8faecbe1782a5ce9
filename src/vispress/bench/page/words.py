"""Numbers in words, the same everywhere on the page."""

from vispress.bench.plan.cells import UNCOMPRESSED
from vispress.bench.results.stats import Interval
from vispress.bench.results.summary import BLIND, Row

TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"
_NAMES = {UNCOMPRESSED: "uncompressed", BLIND: "no image"}


def name_of(group: str) -> str:
    """A group as the page calls it."""
    return _NAMES.get(group, group)


def accuracy(row: Row) -> Interval:
    """Accuracy of a row that has results."""
    assert row.accuracy is not None  # rows without results are filtered before
    return row.accuracy


def percent(value: float) -> str:
    """A share in percent, one decimal, without the sign."""
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference of shares in points, with a sign (a true minus), one decimal."""
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else signed(text)


def signed(text: str) -> str:
    """Numbers with a minus sign in place of a hyphen."""
    return text.replace("-", _MINUS)


def p_value(value: float) -> str:
    """A p-value as the tables print it."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def ratio(value: float | None) -> str:
    """A keep ratio; a dash where a method brings its own budget."""
    return "own" if value is None else f"{value:g}"


def budget(row: Row, before: str = "") -> str:
    """The budget that a row was asked for, empty where it brought its own."""
    return "" if row.keep_ratio is None else f"{before}{row.keep_ratio:g}"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 cell`, `2 cells`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
