"""assign_nearest: the same targets from both backends, ties to the lowest index."""

import pytest
import torch

from vispress_kernels.assign_nearest import assign_nearest
from vispress_kernels.assign_nearest.reference import first_equal

pytest.importorskip("triton")

# B, N, M, D
# 701 targets: a last split with fewer blocks than the others
SHAPES = [(1, 1, 1, 1), (2, 37, 11, 100), (1, 70, 701, 33), (0, 4, 3, 8), (2, 0, 3, 8)]


@pytest.mark.some(cases=8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "N", "M", "D"), SHAPES)
def test_kernel_against_reference(randn, assert_accurate, B, N, M, D, dtype):
    x, targets = randn(B, N, D, dtype=dtype), randn(B, M, D, dtype=dtype)
    index, cosine = assign_nearest(x, targets, backend="triton")
    ref_index, ref_cosine = assign_nearest(x, targets, backend="torch")
    assert torch.equal(index, ref_index)
    exact = torch.cosine_similarity(x[:, :, None].double(), targets[:, None].double(), dim=-1)
    assert_accurate(cosine, ref_cosine, exact.amax(-1) if exact.numel() else ref_cosine.double())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ties_go_to_the_lowest_index_across_blocks(device, backend):
    targets = torch.eye(4, device=device)[None].repeat(1, 50, 1)  # each repeats every 4
    index, cosine = assign_nearest(targets[:, :4], targets, backend=backend)
    assert index.tolist() == [[0, 1, 2, 3]]
    assert cosine.tolist() == [[1.0] * 4]
    index, _ = assign_nearest(targets, targets, exclude_self=True, backend=backend)
    assert index[0, :6].tolist() == [4, 5, 6, 7, 0, 1]


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize("columns", [1, 100], ids=["a program a block", "one for all blocks"])
def test_ties_within_and_across_programs(device, monkeypatch, columns):
    monkeypatch.setattr("vispress_kernels.assign_nearest.kernel.COLUMNS", columns)
    targets = torch.eye(4, device=device)[None].repeat(1, 50, 1)
    index, cosine = assign_nearest(targets[:, :4], targets, backend="triton")
    assert index.tolist() == [[0, 1, 2, 3]]
    assert cosine.tolist() == [[1.0] * 4]
    index, _ = assign_nearest(targets, targets, exclude_self=True, backend="triton")
    assert index[0, :6].tolist() == [4, 5, 6, 7, 0, 1]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equal_targets_tie_whatever_a_product_makes_of_their_places(randn, device, backend):
    for N, M, D in ((1, 9, 130), (2, 17, 300), (3, 37, 33)):
        x, targets = randn(2, N, D), randn(2, 3, D)[:, torch.arange(M, device=device) % 3]
        index, _ = assign_nearest(x, targets, backend=backend)
        assert (index < 3).all()
        # the first copy that is not the row itself
        index, _ = assign_nearest(targets, targets, exclude_self=True, backend=backend)
        own = torch.arange(M, device=device) % 3
        own[:3] += 3
        assert torch.equal(index, own.expand(2, -1))


def test_no_row_is_its_own_nearest_in_any_block(randn, device):
    x = randn(1, 150, 16)
    index, _ = assign_nearest(x, x, exclude_self=True, backend="triton")
    assert torch.equal(index, assign_nearest(x, x, exclude_self=True, backend="torch")[0])
    assert (index != torch.arange(150, device=device)).all()


@pytest.mark.parametrize("block", [4, 1024])
def test_rows_are_equal_in_all_their_numbers(device, block):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 2, (2, 40, 4), generator=generator).float().to(device)
    first = (rows[:, :, None] == rows[:, None]).all(-1).int().argmax(-1)
    assert torch.equal(first_equal(rows, block), first)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_is_never_nearest_and_nothing_to_choose_is_said(device, backend):
    targets = torch.tensor([[[float("nan"), 1.0], [1.0, 0.1]]], device=device)
    x = torch.tensor([[[0.0, 1.0]]], device=device)
    assert assign_nearest(x, targets, backend=backend)[0].item() == 1
    index, cosine = assign_nearest(x, x, exclude_self=True, backend=backend)
    assert (index.item(), cosine.item()) == (0, float("-inf"))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_of_zeros_is_as_near_to_all(device, backend):
    x = torch.tensor([[[0.0, 0.0], [-1.0, 0.0]]], device=device)
    targets = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], device=device)
    index, cosine = assign_nearest(x, targets, backend=backend)
    assert index.tolist() == [[0, 1]]
    assert cosine.tolist() == [[0.0, 0.0]]


def test_strided_input(randn):
    x, targets = randn(2, 20, 37).transpose(1, 2), randn(2, 60, 20)[:, ::3]
    for got, want in zip(
        assign_nearest(x, targets, backend="triton"),
        assign_nearest(x, targets, backend="torch"),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.refusal
def test_bad_input_is_refused():
    x = torch.ones(1, 3, 4)
    with pytest.raises(ValueError, match="targets must not be empty"):
        assign_nearest(x, x[:, :0])
    with pytest.raises(ValueError, match=r"targets must have shape .* got \(1, 3, 2\)"):
        assign_nearest(x, x[..., :2])
    with pytest.raises(TypeError, match="float16"):
        assign_nearest(x, x.half())
