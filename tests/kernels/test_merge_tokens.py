"""merge_tokens: sums and means of groups, their order of addition and their gradients."""

import pytest
import torch

from vispress_kernels.merge_tokens import merge_tokens

pytest.importorskip("triton")

from vispress_kernels.merge_tokens import kernel as kernels

# one token; odd; one group of all; more groups than tokens; empty batch and no group
SHAPES = [
    (1, 1, 1, 1),
    (2, 37, 5, 100),
    (1, 261, 1, 33),
    (2, 9, 20, 16),
    (1, 40, 37, 24),
    (0, 5, 3, 4),
    (2, 5, 0, 4),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_assign(B, N, K, device):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-1, K + 1, (B, N), generator=generator).to(device)  # -1 and K: none


@pytest.mark.some(cases=9)
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "N", "K", "D"), SHAPES)
def test_kernel_against_reference(randn, device, assert_accurate, B, N, K, D, dtype, reduce):
    x, weight = randn(B, N, D, dtype=dtype), randn(B, N).abs()
    assign = make_assign(B, N, K, device)
    kernel, reference, exact = (
        merge_tokens(tokens, assign, K, weight=w, reduce=reduce, backend=backend)
        for tokens, w, backend in (
            (x, weight, "triton"),
            (x, weight, "torch"),
            (x.double(), weight.double(), "torch"),
        )
    )
    assert_accurate(kernel, reference, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_sums_are_in_fp32(randn, device, assert_accurate, dtype):
    x, assign = randn(1, 201, 9, dtype=dtype), torch.zeros(1, 201, dtype=torch.int64, device=device)
    kernel, reference, exact = (
        merge_tokens(tokens, assign, 1, backend=backend)
        for tokens, backend in ((x, "triton"), (x, "torch"), (x.double(), "torch"))
    )
    assert_accurate(kernel, reference, exact)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_hand_worked(device, backend):
    x = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]], device=device)
    assign = torch.tensor([[0, -1, 0, 2]], device=device)
    weight = torch.tensor([[1.0, 1.0, 3.0, 0.5]], device=device)
    total = merge_tokens(x, assign, 3, weight=weight, backend=backend)
    assert total[0, :, 0].tolist() == [13.0, 0.0, 4.0]
    mean = merge_tokens(x, assign, 3, weight=weight, reduce="mean", backend=backend)
    assert mean[0, :, 0].tolist() == [3.25, 0.0, 8.0]
    plain = merge_tokens(x, assign, 3, reduce="mean", backend=backend)
    assert plain[0, :, 0].tolist() == [2.5, 0.0, 8.0]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_token_alone_is_kept_bit_for_bit(randn, device, backend):
    x = randn(2, 9, 30, dtype=torch.bfloat16)
    assign = torch.arange(9, device=device).flip(0).expand(2, 9)
    assert torch.equal(merge_tokens(x, assign, 9, backend=backend), x.flip(1))


def test_runs_agree_bit_for_bit_and_strides_do_not_matter(randn, device):
    x, assign = randn(2, 24, 37).transpose(1, 2), make_assign(2, 37, 4, device)
    out = merge_tokens(x, assign, 4, backend="triton")
    assert torch.equal(out, merge_tokens(x, assign, 4, backend="triton"))
    assert torch.equal(out, merge_tokens(x.contiguous(), assign, 4, backend="triton"))


@pytest.mark.parametrize(("B", "N", "K", "D"), SHAPES[:5])
def test_counting_orders_tokens_as_a_stable_sort(device, B, N, K, D):
    assign = make_assign(B, N, K, device)
    assign[:, ::7] = 2**40  # no number of 32 bits may take it into a group
    order, start = kernels._order_by_counting(assign, K)
    sorted_order, sorted_start = kernels._order_by_sort(assign, K)
    # tokens of no group are behind the groups here, before or behind them there
    assert torch.equal(start, sorted_start - sorted_start[:, :1])
    for b in range(B):
        inside = slice(int(start[b, 0]), int(start[b, -1]))
        assert sorted(order[b].tolist()) == list(range(N))
        sorted_inside = slice(int(sorted_start[b, 0]), int(sorted_start[b, -1]))
        assert order[b, inside].tolist() == sorted_order[b, sorted_inside].tolist()


def test_large_inputs_are_sorted(monkeypatch, randn, device):
    x, assign = randn(2, 37, 24), make_assign(2, 37, 5, device)
    small = merge_tokens(x, assign, 5, backend="triton")
    monkeypatch.setattr(kernels, "MOST_COMPARED", 0)
    assert torch.equal(merge_tokens(x, assign, 5, backend="triton"), small)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_group_without_weight_is_zero(randn, device, backend):
    x, assign = randn(1, 4, 3), torch.tensor([[0, 0, 1, 1]], device=device)
    weight = torch.tensor([[0.0, 0.0, 3.0, 0.0]], device=device)
    mean = merge_tokens(x, assign, 2, weight=weight, reduce="mean", backend=backend)
    assert torch.equal(mean[0], torch.stack([torch.zeros_like(x[0, 0]), x[0, 2]]))


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_gradients_agree_between_backends(randn, device, reduce):
    x, weight, assign = randn(2, 17, 6), randn(2, 17).abs(), make_assign(2, 17, 4, device)
    grads = []
    for backend in ("torch", "triton"):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = merge_tokens(leaves[0], assign, 4, weight=leaves[1], reduce=reduce, backend=backend)
        out.square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for reference, kernel in zip(*grads, strict=True):
        torch.testing.assert_close(kernel, reference)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_pass_tokens_of_no_group_and_no_groups_by(device, backend):
    assign = torch.tensor([[0, 1, -1, 2]], device=device)
    x = torch.ones(1, 4, 1, device=device, requires_grad=True)
    grad = torch.tensor([[[float("inf")], [3.0]]], device=device)
    merge_tokens(x, assign, 2, backend=backend).backward(grad)
    assert x.grad.flatten().tolist() == [float("inf"), 3.0, 0.0, 0.0]
    x.grad = None
    merge_tokens(x, assign, 0, backend=backend).sum().backward()
    assert x.grad.flatten().tolist() == [0.0] * 4


@pytest.mark.refusal
def test_bad_input_is_refused():
    x, assign = torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"assign must have shape \(2, 3\), got \(2, 2\)"):
        merge_tokens(x, assign[:, :2], 2)
    with pytest.raises(TypeError, match="int32"):
        merge_tokens(x, assign.int(), 2)
    with pytest.raises(TypeError, match=r"x must be .* got torch.int64"):
        merge_tokens(x.long(), assign, 2)
    with pytest.raises(ValueError, match=r"num_keep must be in .* got -1"):
        merge_tokens(x, assign, -1)
    with pytest.raises(TypeError, match=r"num_keep must be an integer, got 2\.0"):
        merge_tokens(x, assign, 2.0)
    with pytest.raises(ValueError, match="'max'"):
        merge_tokens(x, assign, 2, reduce="max")
