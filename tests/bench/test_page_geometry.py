"""Scales, ticks and label places of the page's plots."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vispress.bench.page.geometry import Scale, nice_ticks, number, path, spread


def test_scales_by_hand():
    y = Scale(low=0.5, high=1.0, start=100, end=0)
    assert [y(v) for v in (0.5, 0.75, 1.0)] == [100, 50, 0]
    x = Scale(low=8, high=128, start=0, end=40, log=True)
    assert [x(v) for v in (8, 16, 32, 128)] == pytest.approx([0, 10, 20, 40])
    # nothing is drawn outside: no tokens at the end are at the left edge
    assert x(0) == 0
    assert y(0.2) == 100


@pytest.mark.parametrize(
    ("low", "high", "most", "ticks"),
    [
        (0.5, 1.0, 5, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        (0.3, 1.0, 4, [0.4, 0.6, 0.8, 1.0]),
        (0.0, 0.31, 4, [0.0, 0.1, 0.2, 0.3]),
        (0.42, 1.04, 9, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
    ],
)
def test_ticks_are_round(low, high, most, ticks):
    assert nice_ticks(low, high, most) == pytest.approx(ticks)


def test_labels_by_hand():
    # two at one place move apart by the same amount; one far away stays
    assert spread([50, 50, 90], 10, 0, 100) == [45, 55, 90]
    # at the edge all are pushed inside
    assert spread([0, 0, 0], 10, 0, 100) == [0, 10, 20]
    assert spread([100, 99], 10, 0, 100) == [100, 90]
    # too many: the gap gives way
    assert spread([1, 2, 3], 10, 0, 10) == [0, 5, 10]
    assert spread([], 10, 0, 10) == []


@given(st.lists(st.floats(0, 300), min_size=1, max_size=25), st.floats(1, 20))
def test_labels_keep_their_order_and_distance(places, gap):
    out = spread(places, gap, 0, 300)
    room = min(gap, 300 / max(1, len(places) - 1))
    order = sorted(range(len(places)), key=lambda i: (places[i], i))
    for one, other in pairwise(order):
        assert out[other] - out[one] >= room - 1e-6
    assert min(out) >= -1e-6
    assert max(out) <= 300 + 1e-6


def test_paths_are_short():
    assert path([(1.0, 2.04), (3.25, 4)]) == "M1 2L3.2 4"
    assert path([]) == ""
    assert number(10.0) == "10"
