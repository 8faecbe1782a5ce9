"""dct_lowpass: the published example, known gains, and kernel against reference."""

import pytest
import torch

from vispress_kernels.dct_lowpass import dct_lowpass, lowpass_basis

pytest.importorskip("triton")

# B, (H, W), (H', W'), C
CASES = [
    (1, (1, 1), (1, 1), 1),
    (2, (5, 7), (3, 4), 37),
    (1, (24, 24), (12, 12), 5),
    (1, (3, 40), (2, 20), 33),
    (1, (130, 2), (9, 1), 3),  # a height of several blocks
    (1, (4, 4), (4, 4), 8),
    (0, (2, 2), (1, 1), 4),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "size", "new", "C"), CASES, ids=str)
def test_kernel_against_reference(randn, assert_accurate, B, size, new, C, dtype):
    x = randn(B, size[0] * size[1], C, dtype=dtype)
    kernel = dct_lowpass(x, size, new, backend="triton")
    reference = dct_lowpass(x, size, new, backend="torch")
    assert_accurate(kernel, reference, dct_lowpass(x.double(), size, new))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_published_examples(device, backend):
    ramp = torch.arange(16.0, device=device).view(1, 16, 1)
    out = dct_lowpass(ramp, (4, 4), (2, 2), backend=backend).flatten().cpu()
    expected = torch.tensor([1.924, 4.154, 10.846, 13.076])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-3)
    line = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device).view(1, 4, 1)
    out = dct_lowpass(line, (1, 4), (1, 2), rescale=False, backend=backend).flatten().cpu()
    torch.testing.assert_close(out, torch.tensor([1.9584, 5.1127]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("rescale", "gain"), [(True, 1.0), (False, 2.0)])
def test_a_constant_keeps_its_value_or_gains(rescale, gain):
    out = dct_lowpass(torch.ones(1, 576, 2), (24, 24), (12, 12), rescale=rescale)
    torch.testing.assert_close(out, torch.full((1, 144, 2), gain))


def test_the_whole_spectrum_is_the_identity():
    torch.testing.assert_close(lowpass_basis(9, 9), torch.eye(9, dtype=torch.float64))


def test_strided_input(randn):
    x = randn(2, 10, 35).transpose(1, 2)
    kernel = dct_lowpass(x, (5, 7), (2, 3), backend="triton")
    torch.testing.assert_close(kernel, dct_lowpass(x, (5, 7), (2, 3), backend="torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(5, 7), (17, 2)])
def test_gradients_agree_between_backends(randn, size, dtype):
    x, grad = randn(2, size[0] * size[1], 9, dtype=dtype), randn(2, 6, 9, dtype=dtype)
    grads = []
    for backend in ("torch", "triton"):
        leaf = x.clone().requires_grad_()
        dct_lowpass(leaf, size, (3, 2), backend=backend).backward(grad)
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.refusal
def test_bad_input_is_refused():
    x = torch.ones(1, 12, 2)
    with pytest.raises(ValueError, match=r"x must have shape .*20.* got \(1, 12, 2\)"):
        dct_lowpass(x, (4, 5), (2, 2))
    with pytest.raises(ValueError, match=r"new width must be in \[1, 4\], got 5"):
        dct_lowpass(x, (3, 4), (2, 5))
    with pytest.raises(TypeError, match="int64"):
        dct_lowpass(x.long(), (3, 4), (2, 2))
