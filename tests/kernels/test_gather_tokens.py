"""gather_tokens: the kernel against the reference, bit for bit (a copy has no tolerance)."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vispress_kernels.gather_tokens import (
    gather_tokens,
    gather_tokens_many,
    gather_tokens_reference,
)

pytest.importorskip("triton")

# one token; odd everything; D over one block; K == N; many rows; empty batch, keep and width
SHAPES = [
    (1, 1, 1, 1),
    (2, 37, 11, 100),
    (1, 9, 4, 1500),
    (3, 5, 5, 8),
    (1, 577, 64, 33),
    (0, 5, 2, 8),
    (2, 5, 0, 8),
    (2, 5, 2, 0),
]


def make_keep(B, N, K, device):
    generator = torch.Generator().manual_seed(0)
    keep = [torch.randperm(N, generator=generator)[:K] for _ in range(B)]
    return torch.stack(keep).to(device) if B else torch.zeros(0, K, dtype=torch.int64).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "N", "K", "D"), SHAPES)
def test_kernel_equals_reference(randn, device, B, N, K, D, dtype):
    x, keep = randn(B, N, D, dtype=dtype), make_keep(B, N, K, device)
    out = gather_tokens(x, keep, backend="triton")
    assert out.is_contiguous()
    assert torch.equal(out, gather_tokens_reference(x, keep))


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 3), st.integers(1, 40), st.integers(0, 40), st.integers(0, 70))
def test_any_shape(device, B, N, K, D):
    x = torch.arange(B * N * D, device=device).view(B, N, D)
    keep = torch.arange(B * K, device=device).view(B, K) % N
    assert torch.equal(gather_tokens(x, keep, backend="triton"), gather_tokens(x, keep))


def test_tensors_of_different_width_dtype_and_stride_share_a_launch(randn, device):
    keep = make_keep(2, 37, 9, device)
    xs = (
        randn(2, 37, 200, dtype=torch.bfloat16),
        randn(2, 16, 37).transpose(1, 2),  # strided last axis
        torch.arange(3 * 2 * 37, device=device).view(3, 2, 37).permute(1, 2, 0),  # M-RoPE ids
        randn(1, 37, 64).expand(2, -1, -1),  # broadcast batch
        randn(2, 50, 40)[:, 5:42, ::2],
        torch.arange(74, device=device).view(2, 37),
        randn(2, 37) > 0,
        randn(2, 37, 4, 6).transpose(2, 3),
    )
    outs = gather_tokens_many(xs, keep, backend="triton")
    for x, out in zip(xs, outs, strict=True):
        reference = gather_tokens_reference(x, keep)
        assert out.dtype == x.dtype
        assert torch.equal(out, reference)
        assert out.is_contiguous()
        assert reference.is_contiguous()


def test_every_bit_is_kept(device):
    x = torch.tensor([[[float("nan"), -0.0, float("inf"), 1e-45]]], device=device)
    out = gather_tokens(x, torch.zeros(1, 1, dtype=torch.int64, device=device), backend="triton")
    assert torch.equal(out.view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_reach_the_kept_tokens_and_add_up_where_repeated(device, backend):
    x = torch.ones(1, 4, 2, device=device, requires_grad=True)
    ids = torch.arange(4, device=device)[None]
    keep = torch.tensor([[2, 0, 2]], device=device)
    out, kept_ids = gather_tokens_many((x, ids), keep, backend=backend)
    (out * torch.tensor([1.0, 10.0, 100.0], device=device)[:, None]).sum().backward()
    assert x.grad[0, :, 0].tolist() == [10.0, 0.0, 101.0, 0.0]
    assert kept_ids.tolist() == [[2, 0, 2]]


def test_gradients_agree_between_backends(randn, device):
    x, keep = randn(2, 37, 20), make_keep(2, 37, 9, device)
    grads = []
    for backend in ("torch", "triton"):
        leaf = x.clone().requires_grad_()
        gather_tokens(leaf, keep, backend=backend).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("x", "keep", "error", "words"),
    [
        (torch.ones(2, 3, 4), torch.zeros(1, 2, dtype=torch.int64), ValueError, r"\(2, 3, 4\)"),
        (torch.ones(2, 3, 4), torch.zeros(2, dtype=torch.int64), ValueError, r"keep .*\(2,\)"),
        (torch.ones(2, 3, 4), torch.zeros(2, 2, dtype=torch.int32), TypeError, "int32"),
        (torch.ones(2), torch.zeros(2, 2, dtype=torch.int64), ValueError, "token axis"),
        (torch.ones(2, 3) * 1j, torch.zeros(2, 2, dtype=torch.int64), TypeError, "complex64"),
    ],
)
def test_bad_input_is_refused(x, keep, error, words):
    with pytest.raises(error, match=words):
        gather_tokens(x, keep)
