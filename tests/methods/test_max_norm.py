"""Longest tokens, by hand."""

import torch
from tests.methods.helpers import only

from vispress.methods import MaxNorm


def test_keeps_the_longest_and_the_earlier_of_equals():
    x = torch.tensor([[[3.0, 4], [0, 1], [5, 0], [-6, 0]]])
    torch.testing.assert_close(MaxNorm().score(only(features=x)), torch.tensor([[5.0, 1, 5, 6]]))
    assert MaxNorm().plan(only(features=x), 2).keep.tolist() == [[0, 3]]
