"""Numbers in words, the same everywhere on the page."""

from vispress.bench.plan.cells import UNCOMPRESSED
from vispress.bench.results.stats import Interval
from vispress.bench.results.summary import BLIND, Row

TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"
_NAMES = {UNCOMPRESSED: "uncompressed", BLIND: "no image"}


def name_of(group: str) -> str:
    """Name a group as the page calls it."""
    return _NAMES.get(group, group)


def accuracy(row: Row) -> Interval:
    """Take the accuracy of a row that has results."""
    assert row.accuracy is not None  # rows without results are filtered before
    return row.accuracy


def percent(value: float) -> str:
    """Write a share in percent, one decimal, without the sign."""
    return f"{100 * value:.1f}"


def bounds(value: Interval) -> str:
    """Write the ends of an interval in percent."""
    return f"{percent(value.low)} to {percent(value.high)}"


def interval(value: Interval) -> str:
    """Write an accuracy in percent, with its interval."""
    return f"{percent(value.mean)} % ({bounds(value)})"


def points(value: float) -> str:
    """Write a difference of shares in points, with a sign (a true minus), one decimal."""
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else signed(text)


def signed(text: str) -> str:
    """Replace the hyphen of a number by a minus sign."""
    return text.replace("-", _MINUS)


def p_value(value: float) -> str:
    """Write a p-value as the tables print it."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def ratio(value: float | None) -> str:
    """Write a keep ratio; a dash where a method brings its own budget."""
    return "own" if value is None else f"{value:g}"


def budget(row: Row, before: str = "") -> str:
    """Write the budget that a row was asked for, empty where it brought its own."""
    return "" if row.keep_ratio is None else f"{before}{row.keep_ratio:g}"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Count in words: `1 cell`, `2 cells`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def listed(names: list[str]) -> str:
    """Join in words: `a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
