"""Metrics of datasets: worked examples, small enough to check by eye."""

import pytest

from vispress.bench.tasks.metrics import LETTERS, METRICS, chosen_letter

CHOICES = ("a dog", "a cat", "none")


@pytest.mark.parametrize(
    ("metric", "prediction", "accepted", "score"),
    [
        ("exact", " Red. ", ["red"], 1),
        ("exact", "dark red", ["red"], 0),
        ("exact", "two", ["one", "Two"], 1),
        ("contains", "It is dark red!", ["red"], 1),
        ("contains", "a hundred", ["red"], 0),
        ("contains", "anything", ["..."], 0),
        ("yes_no", "Yes, there is no doubt.", ["yes"], 1),
        ("yes_no", "No.", ["Yes"], 0),
        ("yes_no", "nothing to see", ["no"], 0),
        # ten annotators: two say it, so eight rounds see two and two rounds see one
        ("vqa", "a Dog.", ["dog"] * 2 + ["cat"] * 8, (8 * 2 / 3 + 2 * 1 / 3) / 10),
        ("vqa", "dog", ["dog"] * 4 + ["cat"] * 6, 1),
        ("vqa", "two", ["2"] * 10, 1),
        ("vqa", "1,000", ["1,000"], 1),
        ("vqa", "1,000", ["1 000"], 0),
        # one letter of seven is wrong; half of four is at the threshold; less is nothing
        ("anls", "coca-colb", ["Coca-Cola", "pepsi"], 1 - 1 / 9),
        ("anls", "abxx", ["abcd"], 0.5),
        ("anls", "axxx", ["abcd"], 0),
        ("anls", "a  b", ["A B"], 1),
        ("number", "105", ["100"], 1),
        ("number", "106", ["100"], 0),
        ("number", "$1,200.", ["1200"], 1),
        ("number", "12%", ["0.12"], 1),
        ("number", "-95", ["-100"], 1),
        ("number", "0", ["0"], 1),
        ("number", "Yes", ["yes"], 1),
        ("number", "12", ["twelve"], 0),
    ],
)
def test_worked_examples(metric, prediction, accepted, score):
    assert METRICS[metric](prediction, accepted, ()) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B) a cat", "B"),
        ("B: a cat", "B"),
        ("b", "B"),
        ("The answer is B", "B"),
        ("Answer: (C)", "C"),
        ("I choose (A), a dog", "A"),
        ("A cat.", "B"),
        ("A dog", "A"),
        ("none", "C"),
        ("D", None),
        ("a cat or a dog", None),
        ("", None),
    ],
)
def test_the_option_that_is_named(prediction, letter):
    assert chosen_letter(prediction, CHOICES) == letter
    assert METRICS["choice"](prediction, ["B"], CHOICES) == float(letter == "B")


def test_options_of_equal_words_are_no_answer():
    assert chosen_letter("same", ("same", "same")) is None
    assert len(LETTERS) == 26
