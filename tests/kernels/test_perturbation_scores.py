"""perturbation_scores: the shared products against the projector run 2 m times."""

import pytest
import torch
from torch import nn

from vispress_kernels.perturbation_scores import perturbation_scores

pytest.importorskip("triton")

# B, N, Dv, Dh, D, m
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 9, 20, 48, 36, 3), (1, 70, 17, 33, 150, 2), (0, 4, 8, 8, 8, 2)]


def make(randn, B, N, Dv, Dh, D, m, dtype=torch.float32):
    x = randn(B, N, Dv, dtype=dtype)
    w1, b1 = randn(Dh, Dv) * Dv**-0.5, randn(Dh)
    w2, u = randn(D, Dh) * Dh**-0.5, randn(m, Dv)
    return x, w1.to(dtype), b1.to(dtype), w2.to(dtype), (u / u.norm(dim=-1, keepdim=True)).to(dtype)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_against_reference(randn, assert_accurate, shape, dtype, activation):
    args = make(randn, *shape, dtype=dtype)
    kernel = perturbation_scores(*args, activation=activation, backend="triton")
    reference = perturbation_scores(*args, activation=activation, backend="torch")
    exact = perturbation_scores(*(a.double() for a in args), activation=activation)
    assert_accurate(kernel, reference, exact)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_is_the_projector_run_on_both_sides(randn, activation):
    x, w1, b1, w2, u = (a.double() for a in make(randn, 2, 5, 8, 12, 10, 3))
    act = nn.GELU("tanh" if activation == "gelu_tanh" else "none")

    def project(tokens):
        return act(tokens @ w1.T + b1) @ w2.T + 7

    norms = [(project(x + 0.1 * v) - project(x - 0.1 * v)).norm(dim=-1) / 0.2 for v in u]
    out = perturbation_scores(x, w1, b1, w2, u, step=0.1, activation=activation)
    torch.testing.assert_close(out, torch.stack(norms).mean(0))


@pytest.mark.parametrize("directions", [1, 2, 5])
def test_chunks_of_directions_do_not_matter(randn, monkeypatch, directions):
    args = make(randn, 2, 9, 20, 48, 36, 5)
    whole = perturbation_scores(*args, backend="torch")
    monkeypatch.setattr("vispress_kernels.perturbation_scores.kernel.ROWS", directions * 18)
    torch.testing.assert_close(perturbation_scores(*args, backend="triton"), whole)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_weights_take_changes_rounded_after_the_difference(randn, backend, dtype):
    x, w1, b1, w2, u = make(randn, 1, 9, 20, 48, 36, 3)
    w2 = w2.to(dtype)
    change = torch.nn.functional.gelu
    hidden, moves = x @ w1.T + b1, 0.01 * u @ w1.T
    total = 0.0
    for move in moves:
        scale = 2.0 ** float(move.norm().log2().floor() + 1)
        rounded = ((change(hidden + move) - change(hidden - move)) / scale).to(dtype).float()
        total = total + (rounded @ w2.float().T).norm(dim=-1) * scale
    out = perturbation_scores(x, w1, b1, w2, u, backend=backend)
    # a change on the border of two roundings may fall to either
    torch.testing.assert_close(out, total / (3 * 0.02), rtol=5e-4, atol=0)
    exact = perturbation_scores(*(a.double() for a in (x, w1, b1, w2, u)))
    error = ((out - exact) / exact).abs().max()
    assert 2e-5 < error < 2e-3  # rounded, and by less than a unit of bf16


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("step", [1e-7, 1e4])
def test_fp16_holds_the_changes_of_any_step(randn, backend, step):
    x, w1, b1, w2, u = make(randn, 1, 9, 20, 48, 36, 3)
    out = perturbation_scores(x, w1, b1, w2.half(), u, step=step, backend=backend)
    wide = perturbation_scores(x, w1, b1, w2.half().float(), u, step=step, backend=backend)
    torch.testing.assert_close(out, wide, rtol=2e-3, atol=0)


def test_gradients_pass_the_rounding(randn):
    args = make(randn, 1, 5, 8, 12, 10, 3)
    grads = []
    for w2 in (args[3].bfloat16(), args[3].bfloat16().float()):
        x = args[0].clone().requires_grad_()
        perturbation_scores(x, args[1], args[2], w2, args[4]).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rms_is_the_limit_of_a_small_step_and_differentiable(randn, backend):
    x, w1, b1, w2, u = make(randn, 2, 5, 8, 12, 10, 3)
    x.requires_grad_()
    out = perturbation_scores(x, w1, b1, w2, u, average="rms", backend=backend)
    out.sum().backward()
    assert x.grad.abs().sum() > 0
    hidden = (x.detach().double() @ w1.double().T + b1).requires_grad_()
    (slope,) = torch.autograd.grad(nn.functional.gelu(hidden).sum(), hidden)
    moved = slope[None] * (u.double() @ w1.double().T)[:, None, None]
    norms = (moved @ w2.double().T).norm(dim=-1)
    torch.testing.assert_close(out.double(), norms.square().mean(0).sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_factor_of_w2_gives_the_same_scores(randn, backend):
    x, w1, _, w2, u = make(randn, 1, 7, 8, 12, 30, 2)
    _, s, v = torch.linalg.svd(w2, full_matrices=False)
    whole = perturbation_scores(x, w1, None, w2, u, backend=backend)
    factor = perturbation_scores(x, w1, None, s[:, None] * v, u, backend=backend)
    torch.testing.assert_close(factor, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.refusal
def test_bad_input_is_refused(randn):
    x, w1, b1, w2, u = make(randn, 1, 3, 4, 5, 6, 2)
    with pytest.raises(ValueError, match=r"w2 must have shape .* got \(5, 6\)"):
        perturbation_scores(x, w1, b1, w2.T, u)
    with pytest.raises(ValueError, match="directions must not be empty"):
        perturbation_scores(x, w1, b1, w2, u[:0])
    with pytest.raises(ValueError, match="step must be above 0, got 0"):
        perturbation_scores(x, w1, b1, w2, u, step=0.0)
    with pytest.raises(ValueError, match="'relu'"):
        perturbation_scores(x, w1, b1, w2, u, activation="relu")
