"""kmeans_starts: a worked example, and the same starts from both backends."""

import pytest
import torch

from vispress_kernels.kmeans_starts import kmeans_starts

pytest.importorskip("triton")

# B, N, K, D: one token; odd; K == N; more samples
SHAPES = [(1, 1, 1, 1), (2, 19, 4, 20), (1, 9, 9, 130), (3, 70, 9, 8)]
BOTH = pytest.mark.parametrize("backend", ["torch", "triton"])


def numbers(*given, device="cpu"):
    return torch.tensor(given, dtype=torch.float64, device=device)


@pytest.fixture(autouse=True, params=["held", "streamed"])
def way(request, monkeypatch):
    """Cosines of all tokens with each other held, or a row of them computed in each step."""
    few = 1 << 20 if request.param == "held" else 0
    monkeypatch.setattr("vispress_kernels.products.FEW", few)


@pytest.mark.parametrize(("B", "N", "K", "D"), SHAPES)
def test_kernel_draws_as_the_reference(randn, device, B, N, K, D):
    x, drawn = randn(B, N, D), randn(K).sigmoid().double()
    order = kmeans_starts(x, drawn, backend="triton")
    assert torch.equal(order, kmeans_starts(x, drawn, backend="torch"))
    assert all(len(set(row)) == K for row in order.tolist())


@BOTH
def test_a_number_says_where_in_the_squared_distances_its_token_lies(device, backend):
    # from token 1: distances 1, 0, 2, 1, squared 1, 0, 4, 1; sums 1, 1, 5, 6
    x = torch.tensor([[[1.0, 0], [0, 1], [0, -1], [-1, 0]]], device=device)
    for part, pick in ((0.0, 0), (0.16, 0), (0.17, 2), (0.83, 2), (0.84, 3), (0.999, 3)):
        drawn = numbers(0.3, part, device=device)
        assert kmeans_starts(x, drawn, backend=backend).tolist() == [[1, pick]]


@BOTH
def test_where_all_distances_are_0_the_last_token_is_drawn(device, backend):
    x = torch.tensor([[[1.0, 0, 0]] * 4], device=device)
    drawn = numbers(0.1, 0.2, 0.3, device=device)
    assert kmeans_starts(x, drawn, backend=backend).tolist() == [[0, 3, 3]]


@pytest.mark.refusal
def test_bad_input_is_refused():
    x = torch.ones(1, 3, 4)
    with pytest.raises(TypeError, match=r"drawn must be torch.float64"):
        kmeans_starts(x, torch.rand(2))
    with pytest.raises(ValueError, match="x must have tokens to draw 1 of"):
        kmeans_starts(x[:, :0], numbers(0.5))
