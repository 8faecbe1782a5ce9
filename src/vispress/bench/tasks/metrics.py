"""Scoring answers in words against a dataset's: each metric gives a number in `[0, 1]`.

What each field calls by its name, written from the published definitions: VQA accuracy (Antol et
al., arXiv:1505.00468, its leave-one-out form), ANLS (Biten et al., arXiv:1905.13648), relaxed
accuracy (Methani et al., arXiv:1909.00997). The official VQA script also has a table of misspelt
contractions ("dont"); it is left out here.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Final

Metric = Callable[[str, Sequence[str], Sequence[str]], float]
"""`metric(prediction, accepted, choices)`; `accepted` is never empty."""

LETTERS: Final = string.ascii_uppercase
TOLERANCE: Final = 0.05
"""Relative error that a number may have."""
_THRESHOLD: Final = 0.5  # of ANLS: a reading further off than this is worth nothing
_WORDS: Final = "none zero one two three four five six seven eight nine ten"
_NUMBERS: Final = {word: max(0, i - 1) for i, word in enumerate(_WORDS.split())}
_ARTICLES: Final = {"a", "an", "the"}
_PUNCTUATION: Final = re.compile(rf"[{re.escape(string.punctuation)}]")


def exact(prediction: str, accepted: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score equality with one of the answers, but for case, outer space and a final full stop."""
    return float(_plain(prediction) in map(_plain, accepted))


def contains(prediction: str, accepted: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score whether one of the answers stands in the prediction as whole words."""
    said = f" {_words(prediction)} "
    return float(any(f" {_words(answer)} " in said for answer in accepted if _words(answer)))


def yes_no(prediction: str, accepted: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score the first "yes" or "no" of the prediction."""
    word = re.search(r"\b(yes|no)\b", prediction.casefold())
    return float(word is not None and word[1] == _plain(accepted[0]))


def vqa(prediction: str, accepted: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score the share of three annotators that agree, a mean over leaving one of them out.

    With a single answer it is equality.
    """
    said = _vqa_words(prediction)
    agree = [_vqa_words(answer) == said for answer in accepted]
    if len(agree) == 1:
        return float(agree[0])
    return fmean(min(1.0, (sum(agree) - left_out) / 3) for left_out in agree)


def anls(prediction: str, accepted: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score one minus the edit distance over the longer length, best answer; 0 below 0.5."""
    best = max(_similarity(_spaced(prediction), _spaced(answer)) for answer in accepted)
    return best if best >= _THRESHOLD else 0.0


def number(prediction: str, accepted: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score a number within 5 % of the answer; an answer that is no number by `exact`."""
    said = _number(prediction)
    for answer in accepted:
        wanted = _number(answer)
        if said is None or wanted is None:
            right = bool(exact(prediction, [answer]))
        else:
            right = abs(said - wanted) <= TOLERANCE * abs(wanted)
        if right:
            return 1.0
    return 0.0


def choice(prediction: str, accepted: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Score the option that the prediction names; naming none is wrong, never a guess.

    Args:
        prediction: "B", "(B) a dog", "The answer is B." or the option's own words.
        accepted: Its letter.
        choices: The options' words, in order.
    """
    return float(chosen_letter(prediction, choices) in accepted)


def chosen_letter(prediction: str, choices: Sequence[str]) -> str | None:
    """Find the letter of the option that a prediction names, or None."""
    letters = LETTERS[: len(choices)]
    said = prediction.strip()
    # a capital that stands alone at the start, or after "answer is", "option"
    for pattern in (
        rf"\(?([{letters}])(?:[).:,]|\s*$|\s+[-:])",
        rf".*?\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*\(?([{letters}])\b",
        rf".*?\(([{letters}])\)",
    ):
        if match := re.match(pattern, said, flags=re.DOTALL):
            return match[1]
    same = [letter for letter, words in zip(letters, choices, strict=True) if exact(said, [words])]
    if not same and re.fullmatch(rf"[{letters.lower()}]\.?", said):
        same = [said[0].upper()]
    return same[0] if len(same) == 1 else None


METRICS: Final[dict[str, Metric]] = {
    "exact": exact,
    "contains": contains,
    "yes_no": yes_no,
    "vqa": vqa,
    "anls": anls,
    "number": number,
    "choice": choice,
}


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold().strip()
    return text.removesuffix(".").strip()


def _spaced(text: str) -> str:
    return " ".join(text.casefold().split())


def _words(text: str) -> str:
    return " ".join(_PUNCTUATION.sub(" ", text.casefold()).split())


def _vqa_words(text: str) -> str:
    """Lower case, no articles, no punctuation but between digits and in words, digits for words."""
    text = re.sub(r"(?<!\d)[.,:]|[.,:](?!\d)", " ", text.casefold())
    text = re.sub(r"[;/\[\]\"{}()=+\\_<>@`?!]", " ", text)
    words = (str(_NUMBERS.get(word, word)) for word in text.split() if word not in _ARTICLES)
    return " ".join(words)


def _number(text: str) -> float | None:
    """ "1,200", "$3.5" and "12 %" are numbers; 12 % is 0.12, as in the published script."""
    text = text.strip().removesuffix(".").strip().lstrip("$€£").replace(",", "")
    share = text.endswith("%")
    try:
        value = float(text.rstrip("% "))
    except ValueError:
        return None
    return value / 100 if share else value


def _similarity(a: str, b: str) -> float:
    longest = max(len(a), len(b))
    return 1.0 - _distance(a, b) / longest if longest else 1.0


def _distance(a: str, b: str) -> int:
    """Compute Levenshtein's distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]
