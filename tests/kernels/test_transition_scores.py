"""transition_scores: norm ratio and cosine of module input and output."""

import pytest
import torch

from vispress_kernels.transition_scores import transition_scores

pytest.importorskip("triton")

SHAPES = [(1,), (37,), (1, 1, 1), (2, 37, 100), (2, 3, 5, 1500), (1, 131, 9), (0, 5, 4), (2, 0, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_against_reference(randn, assert_accurate, shape, dtype):
    x, y = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    kernel = transition_scores(x, y, backend="triton")
    reference = transition_scores(x, y, backend="torch")
    exact = transition_scores(x.double(), y.double())
    for parts in zip(kernel, reference, exact, strict=True):
        assert_accurate(*parts)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_hand_worked_and_zero_rows(device, backend):
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]], device=device)
    y = torch.tensor([[6.0, 8.0], [5.0, 0.0], [0.0, 0.0]], device=device)
    magnitude, cosine = transition_scores(x, y, backend=backend)
    torch.testing.assert_close(magnitude.cpu(), torch.tensor([2.0, 2.5, 0.0]))
    torch.testing.assert_close(cosine.cpu(), torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_nan_stays_one(device, backend):
    x = torch.tensor([[float("nan"), 1.0], [1.0, 1.0]], device=device)
    for a, b in ((x, x.flip(0)), (x.flip(0), x)):
        for score in transition_scores(a, b, backend=backend):
            assert score.isnan().all()


def test_slices_of_a_sequence_need_no_copy(randn):
    x, y = randn(2, 50, 40)[:, 3:40], randn(2, 40, 50).transpose(1, 2)[:, 3:40]
    kernel = transition_scores(x, y, backend="triton")
    reference = transition_scores(x, y, backend="torch")
    torch.testing.assert_close(kernel, reference)


def test_agrees_with_torch(randn):
    x, y = randn(5, 33), randn(5, 33)
    magnitude, cosine = transition_scores(x, y)
    torch.testing.assert_close(cosine, torch.cosine_similarity(x, y, dim=-1))
    torch.testing.assert_close(magnitude, y.norm(dim=-1) / x.norm(dim=-1))


@pytest.mark.refusal
def test_bad_input_is_refused():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"y must have shape \(2, 3\), got \(2, 2\)"):
        transition_scores(x, x[:, :2])
    with pytest.raises(TypeError, match=r"y must be torch.float32, got torch.float16"):
        transition_scores(x, x.half())
    with pytest.raises(ValueError, match="scalar"):
        transition_scores(x[0, 0], x[0, 0])
