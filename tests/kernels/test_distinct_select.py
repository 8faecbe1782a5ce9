"""distinct_select: a worked example, and the same list from both backends."""

import pytest
import torch

from vispress_kernels.distinct_select import distinct_select

pytest.importorskip("triton")

# B, N, K, D: one left; odd lists; several blocks of places
SHAPES = [(1, 2, 1, 4), (2, 19, 4, 20), (1, 9, 8, 130), (3, 70, 9, 8), (1, 300, 20, 16)]
BOTH = pytest.mark.parametrize("backend", ["torch", "triton"])


@pytest.mark.parametrize("step", [1, 8, 1000])
@pytest.mark.parametrize(("B", "N", "K", "D"), SHAPES)
def test_kernel_chooses_as_the_reference(randn, B, N, K, D, step):
    if N == 300 and step == 1:
        step = 40  # slow by the interpreter's fault
    x = randn(B, N, D)
    left = distinct_select(x, K, step, backend="triton")
    assert torch.equal(left, distinct_select(x, K, step, backend="torch"))
    assert all(len(set(row)) == K for row in left.tolist())


@BOTH
def test_of_even_places_the_most_similar_to_an_odd_one_goes(device, backend):
    x = torch.tensor([[[1.0, 0], [0, 1], [1, 0.2], [1, 0.1], [-1, 0]]], device=device)
    # cosines of 0, 2, 4 to the nearest of 1 and 3: .99504, .99523, 0
    assert distinct_select(x, 4, 1, backend=backend).tolist() == [[0, 4, 1, 3]]


@BOTH
def test_copies_fall_in_the_order_of_the_list(randn, backend):
    x = randn(1, 4, 24).repeat_interleave(2, dim=1).repeat(1, 3, 1)
    # all have a copy at an odd place, and so are equal
    left = distinct_select(x, 21, 3, backend=backend)
    assert left.tolist() == [[*range(6, 24, 2), *range(1, 24, 2)]]


@BOTH
def test_tokens_that_are_not_numbers_are_similar_to_none(randn, backend):
    x = randn(1, 12, 8)
    x[0, 4, 0] = float("nan")  # at an even place
    assert distinct_select(x, 7, 5, backend=backend).tolist()[0][0] == 4


def test_lists_in_several_launches_get_what_they_get_in_one(randn, monkeypatch):
    x = randn(5, 20, 6)
    together = distinct_select(x, 7, 3, backend="triton")
    monkeypatch.setattr("vispress_kernels.products.MOST_HELD", 800)
    assert torch.equal(distinct_select(x, 7, 3, backend="triton"), together)


def test_beyond_what_is_held_the_reference_compares_each_round(randn, monkeypatch):
    x = randn(2, 20, 6)
    held = distinct_select(x, 7, 3)
    for module in ("distinct_select", "distinct_select.reference"):
        monkeypatch.setattr(f"vispress_kernels.{module}.MOST_HELD", 399)
    monkeypatch.delattr("vispress_kernels.distinct_select.kernel.distinct_kernel")
    assert torch.equal(distinct_select(x, 7, 3, backend="triton"), held)


@pytest.mark.refusal
def test_bad_input_is_refused():
    x = torch.ones(1, 3, 4)
    with pytest.raises(ValueError, match=r"num_keep must be in \[0, 3\], got 4"):
        distinct_select(x, 4, 1)
    with pytest.raises(ValueError, match=r"step must be in \[1, .*\], got 0"):
        distinct_select(x, 1, 0)
    with pytest.raises(TypeError, match="x must be fp16"):
        distinct_select(x.long(), 1, 1)
