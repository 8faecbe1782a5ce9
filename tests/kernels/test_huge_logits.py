"""Weights stay a distribution however large the logits are: fp32 numbers lie far apart there."""

import pytest
import torch

from vispress_kernels.column_attention import column_attention
from vispress_kernels.perturbation_scores import perturbation_scores
from vispress_kernels.query_attention import query_attention

pytest.importorskip("triton")

# the interpreter computes what `tl.where` drops
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

FULL = pytest.mark.full
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
S, DH = 70, 40  # several blocks of rows and columns, the last ones part full


def whole_numbers(randn, *shape):
    """From -4 to 4: their products are exact in fp32, in any order, times any power of two."""
    return (2 * randn(*shape)).round().clamp(-4, 4)


def masks_of(name, device):
    """Arguments of one mask, and the pairs (query, key) that it allows, `[S, S]`."""
    places = torch.arange(S, device=device)
    if name == "causal":
        return {"causal": True}, places <= places[:, None]
    if name == "valid":
        valid = places % 5 != 0
        return {"valid": valid[None]}, valid & valid[:, None]
    if name == "packed":
        bounds = torch.tensor([0, 9, 41, S], device=device)
        segment = torch.searchsorted(bounds, places, right=True)
        return {"cu_seqlens": bounds}, segment == segment[:, None]
    return {}, places.new_ones(S, S, dtype=torch.bool)


@pytest.mark.some(cases=5)
@pytest.mark.parametrize("mask", ["none", "causal", "valid", "packed"])
@pytest.mark.parametrize(
    "factor", [pytest.param(30.0, marks=FULL), 3e3, pytest.param(1.9e4, marks=FULL), 1e7]
)
def test_columns_of_random_fp32_add_up(randn, device, factor, mask):
    q, k = factor * randn(1, 2, S, DH), factor * randn(1, 1, S, DH)
    options, allowed = masks_of(mask, device)
    out = column_attention(q, k, backend="triton", **options)
    # a mean over the valid queries of a key's segment: queries that see a key give 1 in all
    met = allowed | allowed.mT if mask == "causal" else allowed
    counts = met.sum(dim=0).clamp(min=1)
    given = (out * counts).sum(dim=-1)
    queries = torch.full_like(given, float(allowed.any(dim=1).sum()))
    torch.testing.assert_close(given, queries, rtol=1e-5, atol=0)
    assert (out * counts <= allowed.sum(dim=0) * (1 + 1e-6)).all()


@pytest.mark.some(cases=7)
@pytest.mark.parametrize("mask", ["none", "causal", "valid", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("power", [pytest.param(4, marks=FULL), 13])
def test_columns_of_equal_logits_share(randn, device, assert_accurate, power, dtype, mask):
    # logits up to 2e9; the largest are equal, so that a sum of 2 or 3 must not be lost beside them
    q, k = (2.0**power * whole_numbers(randn, 1, 2, S, DH)[:, :h] for h in (2, 1))
    q, k = q.to(dtype), k.to(dtype)
    options, _ = masks_of(mask, device)
    ours = column_attention(q, k, scale=0.5, backend="triton", **options)
    reference = column_attention(q, k, scale=0.5, backend="torch", **options)
    assert_accurate(ours, reference, column_attention(q.double(), k.double(), scale=0.5, **options))


@pytest.mark.some(cases=7)
@pytest.mark.parametrize("mean_heads", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("power", [4, 13])
def test_rows_add_up_and_equal_logits_share(randn, assert_accurate, power, dtype, mean_heads):
    q = (2.0**power * whole_numbers(randn, 1, 4, 3, DH)).to(dtype)
    k = (2.0**power * whole_numbers(randn, 1, 2, S, DH)).to(dtype)
    more = {"scale": 0.5, "mean_heads": mean_heads}
    ours = query_attention(q, k, backend="triton", **more)
    torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours[..., 0]), rtol=1e-5, atol=0)
    reference = query_attention(q, k, backend="torch", **more)
    assert_accurate(ours, reference, query_attention(q.double(), k.double(), **more))


@pytest.mark.parametrize("factor", [30.0, 1.9e4, 1e7])
def test_rows_of_random_fp32_add_up(randn, monkeypatch, factor):
    # in two splits, whose peaks meet in the second launch
    monkeypatch.setattr("vispress_kernels.query_attention.kernel.MAX_SPLITS", 2)
    q, k = factor * randn(1, 2, 3, DH), factor * randn(1, 2, 300, DH)
    out = query_attention(q, k, backend="triton")
    torch.testing.assert_close(out.sum(-1), torch.ones_like(out[..., 0]), rtol=1e-5, atol=0)


# only the interpreter says so
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("size", [1e4, 1e15])
def test_an_activation_s_exponent_may_overflow(randn, assert_accurate, size, activation):
    # hidden units of this size, both signs: their cubes pass the range of fp32
    x, u = size * randn(1, 9, 12), size * randn(2, 12)
    w1, b1, w2 = randn(20, 12), randn(20), randn(17, 20)
    more = {"activation": activation, "step": 0.1}
    ours = perturbation_scores(x, w1, b1, w2, u, backend="triton", **more)
    reference = perturbation_scores(x, w1, b1, w2, u, backend="torch", **more)
    assert ours.isfinite().all()
    wide = (t.double() for t in (x, w1, b1, w2, u))
    assert_accurate(ours, reference, perturbation_scores(*wide, **more))
