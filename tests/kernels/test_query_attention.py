"""query_attention: rows of the map for a few queries, masked, grouped and averaged."""

import pytest
import torch

from vispress_kernels.query_attention import query_attention

pytest.importorskip("triton")

# B, H, Hk, Q, N, Dh: one key; odd and grouped; [CLS] row at 197; wide query block; SigLIP heads;
# more heads than are added up at a time
SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 4, 2, 3, 77, 40),
    (1, 1, 1, 1, 197, 64),
    (1, 4, 1, 19, 70, 72),
    (1, 40, 2, 2, 90, 16),
    (0, 2, 2, 1, 5, 16),
    (2, 2, 1, 0, 5, 16),
]


def run(q, k, **kwargs):
    kernel = query_attention(q, k, backend="triton", **kwargs)
    reference = query_attention(q, k, backend="torch", **kwargs)
    return kernel, reference, query_attention(q.double(), k.double(), **kwargs)


@pytest.mark.some(cases=14)
@pytest.mark.parametrize("mean_heads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_against_reference(randn, device, assert_accurate, shape, dtype, mean_heads):
    B, H, Hk, Q, N, Dh = shape
    q, k = randn(B, H, Q, Dh, dtype=dtype), randn(B, Hk, N, Dh, dtype=dtype)
    valid = randn(B, N) > -1
    rows = torch.arange(Q, device=device) + max(N - Q, 0)
    assert_accurate(*run(q, k, rows=rows, key_valid=valid, mean_heads=mean_heads))


def test_matches_torch_softmax(randn):
    q, k = randn(2, 4, 3, 16), randn(2, 2, 9, 16)
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4
    torch.testing.assert_close(query_attention(q, k), logits.softmax(-1))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_masks(randn, device, backend):
    q, k = randn(2, 2, 3, 16), randn(2, 2, 5, 16)
    valid = torch.tensor([[False, True, True, True, True], [False] * 5], device=device)
    out = query_attention(q, k, rows=0, key_valid=valid, backend=backend)
    assert out[0, 0].count_nonzero(-1).tolist() == [0, 1, 2]
    assert not out[1].any()
    own = query_attention(
        q, k, rows=torch.tensor([[4, 0, 1], [0, 0, 0]], device=device), backend=backend
    )
    assert own[0, 1].count_nonzero(-1).tolist() == [5, 1, 2]
    torch.testing.assert_close(own.sum(-1), torch.ones_like(own[..., 0]))


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize("mean_heads", [False, True])
@pytest.mark.parametrize("rows", [None, 30])
def test_a_mask_row_for_each_query(randn, assert_accurate, rows, mean_heads):
    # heads of 4: with the heads averaged, two queries at a time
    q, k = randn(2, 2, 5, 4), randn(2, 1, 77, 4)
    valid = randn(2, 5, 77) > 0
    valid[1, 3] = False
    for mask in (
        valid,
        valid.transpose(1, 2).contiguous().transpose(1, 2),
        valid[:1].expand(2, -1, -1),
    ):
        assert_accurate(*run(q, k, rows=rows, key_valid=mask, mean_heads=mean_heads))


@pytest.mark.parametrize("mean_heads", [False, True])
def test_splits_of_several_blocks(randn, assert_accurate, monkeypatch, mean_heads):
    # as for more than 128 x 64 keys
    monkeypatch.setattr("vispress_kernels.query_attention.kernel.MAX_SPLITS", 2)
    q, k = randn(1, 2, 2, 16), randn(1, 2, 300, 16)
    for rows in (100, 250):  # the second split sees nothing, and some of its keys
        assert_accurate(*run(q, k, rows=rows, mean_heads=mean_heads))


def test_strided_inputs(randn, assert_accurate):
    q, k = randn(2, 3, 4, 32).transpose(1, 2), randn(2, 80, 2, 32)[:, ::2].transpose(1, 2)
    assert_accurate(*run(q, k, mean_heads=True))
    valid = randn(2, 50) > -1
    for mask in (valid[:, 3:43], valid[1:, :40].expand(2, -1)):
        assert_accurate(*run(q, k, key_valid=mask, mean_heads=True))


def test_the_last_shift_is_the_largest_logit(device):
    q = torch.full((1, 1, 1, 16), 100.0, device=device)
    k = torch.linspace(-1, 1, 200, device=device)[None, None, :, None].expand(1, 1, 200, 16)
    out = query_attention(q, k, backend="triton")
    assert out.isfinite().all()
    torch.testing.assert_close(out, query_attention(q, k, backend="torch"))


def test_the_reference_is_differentiable_and_the_kernel_says_it_is_not(randn):
    q, k = randn(1, 1, 1, 16).requires_grad_(), randn(1, 1, 4, 16)
    query_attention(q, k).square().sum().backward()
    assert q.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="no backward"):
        query_attention(q, k, backend="triton")


@pytest.mark.refusal
def test_bad_input_is_refused():
    q, k = torch.ones(1, 4, 1, 8), torch.ones(1, 3, 5, 8)
    with pytest.raises(ValueError, match="4 heads, which the 3 heads"):
        query_attention(q, k)
    with pytest.raises(ValueError, match=r"k must have shape .* got \(1, 3, 5, 4\)"):
        query_attention(q, k[..., :4])
    with pytest.raises(TypeError, match="float16"):
        query_attention(q, k[:, :2].half())
    with pytest.raises(TypeError, match=r"key_valid must be torch.bool"):
        query_attention(q, k[:, :2], key_valid=torch.ones(1, 5))
    with pytest.raises(TypeError, match=r"rows must be an int64 tensor, .* got 1\.5"):
        query_attention(q, k[:, :2], rows=1.5)
    with pytest.raises(ValueError, match=r"width of at least 1, got q of shape \(1, 4, 1, 0\)"):
        query_attention(q[..., :0], k[:, :2, :, :0])
    with pytest.raises(ValueError, match=r"rows must have shape"):
        query_attention(q, k[:, :2], rows=torch.zeros(2, dtype=torch.int64))
