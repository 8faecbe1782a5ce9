"""column_attention: what each key receives, packed, causal and padded."""

import pytest
import torch

from vispress_kernels.column_attention import column_attention
from vispress_kernels.query_attention import query_attention

pytest.importorskip("triton")

# the interpreter computes what `tl.where` drops
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# B, H, Hk, S, Dh
SHAPES = [
    (1, 1, 1, 1, 16),
    (2, 2, 1, 67, 40),
    (1, 1, 1, 100, 72),
    (0, 1, 1, 4, 16),
    (1, 1, 1, 0, 16),
]


def run(q, k, **kwargs):
    kernel = column_attention(q, k, backend="triton", **kwargs)
    reference = column_attention(q, k, backend="torch", **kwargs)
    return kernel, reference, column_attention(q.double(), k.double(), **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "H", "Hk", "S", "Dh"), SHAPES)
def test_kernel_against_reference(randn, assert_accurate, B, H, Hk, S, Dh, dtype):
    q, k = randn(B, H, S, Dh, dtype=dtype), randn(B, Hk, S, Dh, dtype=dtype)
    assert_accurate(*run(q, k))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_masks_against_reference(randn, device, assert_accurate, causal, padded, packed):
    q, k = randn(2, 1, 77, 16), randn(2, 1, 77, 16)
    bounds = torch.tensor([0, 5, 5, 40, 77], device=device, dtype=torch.int32)
    valid = randn(2, 77) > -1
    valid[1, :9] = False
    assert_accurate(
        *run(
            q,
            k,
            causal=causal,
            valid=valid if padded else None,
            cu_seqlens=bounds if packed else None,
        )
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_is_the_mean_of_the_whole_map(randn, backend):
    q, k = randn(1, 2, 37, 16), randn(1, 1, 37, 16)
    full = query_attention(q, k).mean(-2)
    torch.testing.assert_close(column_attention(q, k, backend=backend), full)
    mean = column_attention(q, k, mean_heads=True, backend=backend)
    torch.testing.assert_close(mean, full.mean(1))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_packed_segments_are_as_alone(randn, device, backend):
    q, k = randn(1, 2, 41, 16), randn(1, 2, 41, 16)
    bounds = torch.tensor([0, 30, 41], device=device)
    packed = column_attention(q, k, cu_seqlens=bounds, backend=backend)
    alone = [
        column_attention(q[:, :, a:b], k[:, :, a:b], backend=backend)
        for a, b in ((0, 30), (30, 41))
    ]
    torch.testing.assert_close(packed, torch.cat(alone, -1))


@pytest.mark.some(cases=2)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("few", [1, 1000])
def test_blocks_inside_a_segment_and_across(
    randn, device, assert_accurate, monkeypatch, few, causal
):
    # blocks of 128 and of 64 rows, some of which meet one segment only and need no mask
    monkeypatch.setattr("vispress_kernels.column_attention.kernel.FEW_PROGRAMS", few)
    q, k = randn(1, 1, 460, 80, dtype=torch.float16), randn(1, 1, 460, 80, dtype=torch.float16)
    bounds = torch.tensor([0, 300, 300, 331, 460], device=device)
    assert_accurate(*run(q, k, cu_seqlens=bounds, causal=causal))
    assert_accurate(*run(q, k, causal=causal))


@pytest.mark.parametrize("scale", [-8.0, 0.0])
@pytest.mark.parametrize("padded", [False, True])
def test_a_scale_that_turns_the_order_or_none(randn, device, assert_accurate, padded, scale):
    q, k = randn(1, 2, 70, 16), randn(1, 2, 70, 16)
    valid = torch.arange(70, device=device)[None] > 40 if padded else None
    assert_accurate(*run(q, k, scale=scale, valid=valid))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("of", ["q", "k"])
def test_nan_stays_in_its_segment(randn, device, backend, of):
    q, k = randn(1, 1, 40, 16), randn(1, 1, 40, 16)
    bounds = torch.tensor([0, 17, 31, 40], device=device)
    clean = column_attention(q, k, cu_seqlens=bounds, backend=backend)
    (q if of == "q" else k)[0, 0, 20, 3] = float("nan")
    out = column_attention(q, k, cu_seqlens=bounds, backend=backend)
    assert out[0, 0].isnan().nonzero()[:, 0].tolist() == list(range(17, 31))
    others = ~out.isnan()
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_invalid_places_may_hold_anything(randn, device, backend):
    q, k = randn(1, 1, 40, 16), randn(1, 1, 40, 16)
    valid = torch.arange(40, device=device)[None] >= 9
    clean = column_attention(q, k, valid=valid, backend=backend)
    q[:, :, :9] = k[:, :, :9] = float("nan")
    assert torch.equal(column_attention(q, k, valid=valid, backend=backend), clean)


@pytest.mark.refusal
def test_bad_input_is_refused():
    q = torch.ones(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"k must have shape .* got \(1, 2, 4, 8\)"):
        column_attention(q, q[:, :, :4])
    with pytest.raises(ValueError, match="got 1 bounds"):
        column_attention(q, q, cu_seqlens=torch.tensor([0]))
    for bounds in ([0, 4], [0, 4, 9], [1, 5], [0, 4, 2, 5]):
        with pytest.raises(ValueError, match=r"cu_seqlens must run from 0 to 5 .* got \[[01], "):
            column_attention(q, q, cu_seqlens=torch.tensor(bounds), backend="torch")
    with pytest.raises(TypeError, match="float32"):
        column_attention(q, q, cu_seqlens=torch.tensor([0.0, 5.0]))
    with pytest.raises(TypeError, match=r"valid must be torch.bool"):
        column_attention(q, q, valid=torch.ones(1, 5))
