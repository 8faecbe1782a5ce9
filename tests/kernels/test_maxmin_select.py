"""maxmin_select: published orders, ties, and the same order from both backends."""

import pytest
import torch

from vispress_kernels.maxmin_select import maxmin_select
from vispress_kernels.maxmin_select.reference import most_isolated

pytest.importorskip("triton")

# the worked example of the specification
TOKENS = [
    [1, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.9, 0.2],
    [0, 0, 1], [0.6, 0.5, 0.4], [-0.2, 0.1, 0.9], [0.7, -0.1, 0.1],
]  # fmt: skip
# B, N, K, D: one token; odd; K == N; several blocks
SHAPES = [(1, 1, 1, 1), (2, 19, 4, 20), (1, 9, 9, 130), (1, 70, 3, 8), (0, 4, 2, 8), (2, 4, 0, 8)]


@pytest.fixture(autouse=True, params=["held", "streamed"])
def way(request, monkeypatch):
    """Cosines of all tokens with each other held, or a row of them computed in each step."""
    if request.param == "streamed":
        monkeypatch.setattr("vispress_kernels.maxmin_select.kernel.MOST", 0)
        for module in ("products", "maxmin_select.reference"):
            monkeypatch.setattr(f"vispress_kernels.{module}.fits", lambda *_: False)
    else:
        monkeypatch.setattr("vispress_kernels.products.FEW", 1 << 20)
    return request.param


@pytest.mark.some(cases=15)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "N", "K", "D"), SHAPES)
def test_kernel_chooses_as_the_reference(randn, B, N, K, D, dtype, weighted):
    x, weight = randn(B, N, D, dtype=dtype), randn(B, N).abs() if weighted else None
    order = maxmin_select(x, K, weight=weight, backend="triton")
    assert torch.equal(order, maxmin_select(x, K, weight=weight, backend="torch"))
    assert all(len(set(row)) == K for row in order.tolist())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_divprune_order(device, backend):
    x = torch.tensor([TOKENS], device=device)
    assert maxmin_select(x, 4, backend=backend).tolist() == [[5, 6, 2, 7]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sads_order(device, backend):
    weight = torch.tensor([[0.2, 1, 0.3, 0.9, 0.5, 0.8, 0, 0.6]], device=device)
    x = torch.tensor([TOKENS], device=device)
    assert maxmin_select(x, 4, weight=weight, backend=backend).tolist() == [[1, 3, 4, 5]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_first_may_be_given(device, backend):
    x = torch.tensor([TOKENS, TOKENS], device=device)
    first = torch.tensor([0, 4], device=device)
    order = maxmin_select(x, 2, first=first, backend=backend)
    assert order[:, 0].tolist() == [0, 4]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equal_tokens_are_taken_once_each_in_order(device, backend):
    x = torch.ones(1, 9, 3, device=device)
    assert maxmin_select(x, 9, backend=backend).tolist() == [list(range(9))]


def test_mutual_neighbours_tie_whichever_of_them_rounds_lower(device):
    close = 0.25
    nearest = torch.tensor([[close + 2**-23, close, 0.9]], device=device)
    assert nearest[0, 0] > nearest[0, 1]
    assert most_isolated(nearest).tolist() == [0]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_copies_of_chosen_tokens_tie_whatever_rounding_leaves_of_them(randn, backend):
    order = maxmin_select(randn(1, 6, 20).repeat(1, 3, 1), 18, backend=backend)[0].tolist()
    assert sorted(order[:6]) == list(range(6))
    assert order[6:] == list(range(6, 18))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_weightless_and_nan_tokens_come_last(device, backend):
    x = torch.eye(5, device=device)[None].clone()
    weight = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0]], device=device)
    assert maxmin_select(x, 5, weight=weight, backend=backend).tolist() == [[1, 2, 3, 4, 0]]
    x[0, 1] = float("nan")
    assert maxmin_select(x, 5, backend=backend)[0, -1].item() == 1


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_after_a_nan_token_distances_say_nothing(device, backend):
    x = torch.tensor([TOKENS], device=device)
    x[0, 3] = float("nan")
    first = torch.tensor([3], device=device)
    order = maxmin_select(x, 5, first=first, backend=backend)
    assert order.tolist() == [[3, 0, 1, 2, 4]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_token_of_zeros_is_at_right_angles_to_all(device, backend):
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 0.0], [-1.0, 0.0]]], device=device)
    first = torch.tensor([0], device=device)
    assert maxmin_select(x, 4, first=first, backend=backend).tolist() == [[0, 3, 2, 1]]


def test_strides_do_not_matter(randn):
    x = randn(2, 20, 15).transpose(1, 2)
    order = maxmin_select(x, 4, backend="triton")
    assert torch.equal(order, maxmin_select(x.contiguous(), 4, backend="triton"))


@pytest.mark.refusal
def test_bad_input_is_refused():
    x = torch.ones(1, 3, 4)
    with pytest.raises(ValueError, match=r"num_keep must be in \[0, 3\], got 4"):
        maxmin_select(x, 4)
    with pytest.raises(ValueError, match="needs a weight"):
        maxmin_select(x, 1, first="weight")
    with pytest.raises(ValueError, match="'last'"):
        maxmin_select(x, 1, first="last")
    with pytest.raises(TypeError, match=r"first must be torch.int64"):
        maxmin_select(x, 1, first=torch.zeros(1))
    with pytest.raises(ValueError, match=r"weight must have shape \(1, 3\), got \(1, 2\)"):
        maxmin_select(x, 1, weight=torch.ones(1, 2))
