"""cover_select: a worked example, and the same order from both backends."""

import pytest
import torch

from vispress_kernels.cover_select import cover_select

pytest.importorskip("triton")

TOKENS = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0]]
# B, N, K, D: one token; odd; K == N; more samples
SHAPES = [(1, 1, 1, 1), (2, 19, 4, 20), (1, 9, 9, 130), (1, 70, 9, 8), (3, 21, 20, 40)]
BOTH = pytest.mark.parametrize("backend", ["torch", "triton"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "N", "K", "D"), SHAPES)
def test_kernel_chooses_as_the_reference(randn, B, N, K, D, dtype):
    x, fit = randn(B, N, D, dtype=dtype), randn(B, N)
    order, gain = cover_select(x, fit, K, backend="triton")
    expected, gains = cover_select(x, fit, K, backend="torch")
    assert torch.equal(order, expected)
    torch.testing.assert_close(gain, gains, rtol=1e-5, atol=1e-4)


@BOTH
def test_a_token_is_taken_after_its_equal_for_what_it_fits(device, backend):
    x, fit = torch.tensor([TOKENS], device=device), torch.tensor([[10.0, 5, 10, 0]], device=device)
    # alone: .5 + 1 + .5 + .5 of others, and the fit; then 2 gains its fit of 10 and no coverage
    order, gain = cover_select(x, fit, 3, backend=backend)
    assert order.tolist() == [[0, 2, 1]]
    torch.testing.assert_close(gain.cpu(), torch.tensor([[13.0, 10.0, 5.5]]))


@BOTH
def test_copies_cover_nothing_more(randn, backend):
    x = randn(1, 5, 64).repeat(1, 4, 1)
    order, gain = cover_select(x, torch.zeros_like(x[..., 0]), 8, backend=backend)
    assert sorted(order[0, :5].tolist()) == list(range(5))
    assert (gain[0, 5:].abs() < 1e-4).all()


@BOTH
def test_a_nan_is_in_all_gains_of_its_sample_and_in_no_other(randn, backend):
    x = randn(2, 6, 4)
    x[:, 2] = x[:, 0]  # equal tokens wait for the first, and count as NaN no less
    x[0, 4, 0] = float("nan")
    order, gain = cover_select(x, torch.ones_like(x[..., 0]), 6, backend=backend)
    assert order[0].tolist() == list(range(6))
    assert bool(gain[0].isnan().all())
    alone = cover_select(x[1:], torch.ones_like(x[1:, :, 0]), 6, backend=backend)
    assert torch.equal(order[1:], alone[0])


def test_samples_in_several_launches_get_what_they_get_in_one(randn, monkeypatch):
    x, fit = randn(5, 20, 6), randn(5, 20)
    together = cover_select(x, fit, 7, backend="triton")[0]
    monkeypatch.setattr("vispress_kernels.cover_select.kernel.together", lambda b, _: 2 // b)
    assert torch.equal(cover_select(x[:, :1], fit[:, :1], 1, backend="triton")[0].flatten(),
                       torch.zeros(5, dtype=torch.int64, device=x.device))  # fmt: skip
    if torch.cuda.is_available():
        assert torch.equal(cover_select(x, fit, 7, backend="triton")[0], together)


def test_beyond_what_a_program_holds_the_reference_runs(randn, monkeypatch):
    x, fit = randn(1, 30, 6), randn(1, 30)
    expected = cover_select(x, fit, 5, backend="torch")[0]
    monkeypatch.setattr("vispress_kernels.cover_select.kernel.MOST", 29)
    monkeypatch.delattr("vispress_kernels.cover_select.kernel.cover_kernel")
    assert torch.equal(cover_select(x, fit, 5, backend="triton")[0], expected)


@pytest.mark.refusal
def test_bad_input_is_refused():
    x = torch.ones(1, 3, 4)
    with pytest.raises(ValueError, match=r"num_keep must be in \[0, 3\], got 4"):
        cover_select(x, x[..., 0], 4)
    with pytest.raises(ValueError, match=r"fit must have shape \(1, 3\), got \(1, 2\)"):
        cover_select(x, x[:, :2, 0], 1)
    with pytest.raises(TypeError, match="fit must be fp16"):
        cover_select(x, x[..., 0].long(), 1)
