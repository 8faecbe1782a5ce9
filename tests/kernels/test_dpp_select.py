"""dpp_select: worked examples, beyond the rank, and the same order from both backends."""

import pytest
import torch

from vispress_kernels.dpp_select import dpp_select

pytest.importorskip("triton")

# B, N, K, D: one token; odd; K beyond the rank; several blocks
SHAPES = [(1, 1, 1, 1), (2, 19, 4, 20), (1, 9, 9, 3), (1, 70, 3, 140), (0, 4, 2, 8), (2, 4, 0, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "N", "K", "D"), SHAPES)
def test_kernel_chooses_as_the_reference(randn, B, N, K, D, dtype):
    x, relevance = randn(B, N, D, dtype=dtype), randn(B, N).abs()
    order = dpp_select(x, relevance, K, backend="triton")
    assert torch.equal(order, dpp_select(x, relevance, K, backend="torch"))
    assert all(len(set(row)) == K for row in order.tolist())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_worked_example(device, backend):
    similarity = torch.tensor([[1, 0.9, 0.1], [0.9, 1, 0.2], [0.1, 0.2, 1]], device=device)
    x = torch.linalg.cholesky(similarity)[None]
    relevance = torch.tensor([[1, 0.95, 0.5]], device=device)
    assert dpp_select(x, relevance, 3, backend=backend).tolist() == [[0, 2, 1]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_beyond_the_rank_relevance_decides(device, backend):
    x = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1], [1, 1]]], device=device)
    relevance = torch.tensor([[0.9, 0.2, 0.8, 0.3, 0.25]], device=device)
    assert dpp_select(x, relevance, 5, backend=backend).tolist() == [[0, 2, 3, 4, 1]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equal_tokens_and_no_relevance_are_taken_once_each(device, backend):
    x = torch.ones(1, 9, 3, device=device)
    assert dpp_select(x, x[..., 0], 9, backend=backend).tolist() == [list(range(9))]
    assert dpp_select(x, 0 * x[..., 0], 9, backend=backend).tolist() == [list(range(9))]


def by_relevance(order, relevance, found):
    """Whether all but the first found tokens are in the order of relevance."""
    most = relevance.argsort(descending=True).tolist()
    return order[found:] == [i for i in most if i not in order[:found]][: len(order) - found]


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rounding_is_no_gain_where_the_rank_is_below_the_width(randn, backend):
    x, relevance = randn(6, 20, 3) @ randn(3, 40), randn(6, 20).abs()
    order = dpp_select(x, relevance, 12, backend=backend).tolist()
    assert all(by_relevance(*each, 3) for each in zip(order, relevance, strict=True))


def test_there_is_no_gain_beyond_the_width(randn, monkeypatch):
    # as if what rounding leaves were more than the floor: the factor has no third column
    monkeypatch.setattr("vispress_kernels.dpp_select.kernel.NOISE", -1.0)
    x, relevance = randn(1, 9, 2), randn(1, 9).abs()
    assert by_relevance(dpp_select(x, relevance, 6, backend="triton")[0].tolist(), relevance[0], 2)


@pytest.mark.parametrize("launches", ["one", "a step"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_counts_as_no_relevance(device, monkeypatch, backend, launches):
    if launches == "a step":
        monkeypatch.setattr("vispress_kernels._greedy.together", lambda *_: 0)
    x = torch.eye(4, device=device)[None]
    relevance = torch.tensor([[0.0, float("nan"), 0.3, 0.2]], device=device)
    for scale in (1.0, 1e-30):  # the square of the second is 0: relevance decides
        assert dpp_select(x, scale * relevance, 4, backend=backend).tolist() == [[2, 3, 0, 1]]


def test_each_step_maximises_the_determinant(randn):
    x, relevance = randn(1, 12, 8, dtype=torch.float64), randn(1, 12).abs().double()
    unit = x[0] / x[0].norm(dim=-1, keepdim=True) * relevance[0][:, None]
    kernel = unit @ unit.T
    chosen: list[int] = []
    for _ in range(5):
        gains = [
            -1.0 if i in chosen else torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]).item()
            for i in range(12)
        ]
        chosen.append(max(range(12), key=gains.__getitem__))
    assert dpp_select(x, relevance, 5).tolist() == [chosen]


@pytest.mark.refusal
def test_bad_input_is_refused():
    x = torch.ones(1, 3, 4)
    with pytest.raises(ValueError, match=r"relevance must have shape \(1, 3\), got \(1, 2\)"):
        dpp_select(x, torch.ones(1, 2), 1)
    with pytest.raises(ValueError, match=r"num_keep must be in \[0, 3\], got 5"):
        dpp_select(x, torch.ones(1, 3), 5)
    with pytest.raises(TypeError, match="relevance must be"):
        dpp_select(x, torch.ones(1, 3, dtype=torch.int64), 1)
