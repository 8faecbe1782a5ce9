"""Bootstrap intervals: against exact values, and the same every time."""

import math

import pytest

from vispress.bench.results.stats import bootstrap_mean, quantiles


def binomial_quantile(n, p, q):
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= q:
            return k / n
    raise AssertionError


def test_interval_of_yes_and_no_is_the_binomial_one():
    # resampling n answers of which a share p is right draws from Binomial(n, p)
    interval = bootstrap_mean([[1] * 30 + [0] * 20], resamples=20_000)
    assert interval.mean == 0.6
    assert interval.low == pytest.approx(binomial_quantile(50, 0.6, 0.025), abs=0.021)
    assert interval.high == pytest.approx(binomial_quantile(50, 0.6, 0.975), abs=0.021)


def test_same_seed_same_interval():
    scores = [[1, 0, 0, 1, 1, 0, 1]]
    assert bootstrap_mean(scores, seed=3) == bootstrap_mean(scores, seed=3)
    many = [[1, 0] * 500]
    assert bootstrap_mean(many, seed=3) != bootstrap_mean(many, seed=4)


def test_tasks_weigh_the_same_whatever_their_size():
    assert bootstrap_mean([[1] * 10, [0] * 1000]).mean == 0.5


def test_tasks_are_resampled_apart():
    # each task alone is certain, so is their mean
    interval = bootstrap_mean([[1] * 10, [0] * 10])
    assert (interval.low, interval.high) == (0.5, 0.5)


def test_all_right_is_not_certainty():
    interval = bootstrap_mean([[1] * 24])
    assert interval.high == 1.0
    assert interval.low == pytest.approx(0.025 ** (1 / 24))
    assert bootstrap_mean([[0] * 24]).high == pytest.approx(1 - 0.025 ** (1 / 24))


@pytest.mark.parametrize("bad", [[], [[]], [[1], []]])
def test_no_scores_are_refused(bad):
    with pytest.raises(ValueError, match="at least one score"):
        bootstrap_mean(bad)


def test_quantiles():
    assert quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]).median == 3.5
    assert quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).p20 == 2.0
