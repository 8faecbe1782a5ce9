"""Held-out questions in which no answer is more often right than the others."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import TypeVar

from vispress.reference.world.episodes import Asked

T = TypeVar("T")


def balanced(
    show: Callable[[int], T],
    asked: Callable[[T], Sequence[Asked]],
    forms: Mapping[str, int],
    n: int,
) -> Iterator[tuple[T, Asked]]:
    """Balance answers: take one question of each scene or clip until there are n.

    The forms take turns, and no answer of a form is right more often than its share, rounded up.

    Args:
        show: Draws what a number stands for.
        asked: All questions about it.
        forms: Those that may be asked, with the number of their answers.
        n: How many.
    """
    share, drawn = -(-n // len(forms)), 0
    taken: Counter[tuple[str, str]] = Counter()
    by_form: Counter[str] = Counter()
    for index in count():
        if drawn == n:
            return
        shown = show(index)
        for q in asked(shown):
            if q.form not in forms or by_form[q.form] >= share:
                continue
            if taken[q.form, q.answer] < -(-share // forms[q.form]):
                taken[q.form, q.answer] += 1
                by_form[q.form] += 1
                drawn += 1
                yield shown, q
                break
