"""Fourier, average pooling and uniform sampling: grids, values and where they go."""

from dataclasses import replace

import pytest
import torch
from scipy.fft import dctn, idctn
from tests.methods.helpers import anyres, make_tokens, only
from torch.nn import functional as F

from vispress.errors import ConfigError, UnsupportedMethodError
from vispress.methods import AvgPool, Fourier, Uniform
from vispress.methods._parts.geometry.grids import middles, small_grid
from vispress.methods.avg_pool import window_means
from vispress.types import CropLayout
from vispress_kernels.dct_lowpass import lowpass_basis


def grid_tokens(picture):
    """One image whose features are a picture `[h, w, C]`."""
    h, w, _ = picture.shape
    return only(features=picture.flatten(0, 1)[None], grid=(1, h, w))


def ramp():
    return torch.arange(16.0).view(4, 4, 1)


# --- the grid


@pytest.mark.parametrize(
    ("h", "w", "num_keep", "grid"),
    [
        (24, 24, 144, (12, 12)),
        (24, 24, 64, (8, 8)),
        (24, 24, 60, (7, 8)),
        (24, 24, 575, (23, 24)),
        (24, 24, 576, (24, 24)),
        (12, 24, 72, (6, 12)),
        (24, 12, 72, (12, 6)),
        (4, 6, 1, (1, 1)),
        (24, 24, 2, (1, 2)),
        (1, 10, 5, (1, 5)),
        (2, 9, 17, (2, 8)),
    ],
)
def test_grid_fits_the_budget_with_the_image_s_aspect(h, w, num_keep, grid):
    assert small_grid(h, w, num_keep) == grid


def test_no_grid_could_grow_within_the_budget():
    for h, w in [(5, 7), (8, 8), (3, 12)]:
        for num_keep in range(1, h * w + 1):
            rows, cols = small_grid(h, w, num_keep)
            assert rows * cols <= num_keep
            assert rows == h or (rows + 1) * cols > num_keep
            assert cols == w or rows * (cols + 1) > num_keep


def test_middles_are_the_centres_of_equal_cells():
    assert middles(10, 4).tolist() == [1, 3, 6, 8]
    assert middles(24, 12).tolist() == list(range(1, 24, 2))
    assert middles(7, 7).tolist() == list(range(7))
    for large in range(1, 40):
        for small in range(1, large + 1):
            steps = middles(large, small).diff()
            assert (steps > 0).all()


# --- Fourier


def test_one_dimensional_worked_example():
    x = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    for gain, expected in [(1, [1.9584, 5.1127]), (2**0.5, [1.3848, 3.6152])]:
        torch.testing.assert_close(
            lowpass_basis(4, 2) / gain @ x,
            torch.tensor(expected, dtype=torch.float64),
            rtol=0,
            atol=5e-5,
        )


def test_two_dimensional_worked_example():
    plan = Fourier(values="features").plan(grid_tokens(ramp()), 4)
    expected = torch.tensor([1.924, 4.154, 10.846, 13.076])
    torch.testing.assert_close(plan.features.flatten(), expected, rtol=0, atol=5e-4)
    assert plan.keep.tolist() == [[5, 7, 13, 15]]


@pytest.mark.parametrize(("rescale", "value"), [(True, 1.0), (False, 2.0)])
def test_a_constant_stays_or_gains_as_documented(rescale, value):
    plan = Fourier(values="features", rescale=rescale).plan(grid_tokens(torch.ones(24, 24, 2)), 144)
    torch.testing.assert_close(plan.features, torch.full((1, 144, 2), value))


def test_equals_the_cosine_transform_of_scipy():
    picture = torch.randn(6, 9, 3, generator=torch.Generator().manual_seed(0))
    plan = Fourier(values="features", rescale=False).plan(grid_tokens(picture), 24)
    corner = dctn(picture.numpy(), axes=(0, 1), norm="ortho")[:4, :6]
    expected = idctn(corner, axes=(0, 1), norm="ortho")
    torch.testing.assert_close(
        plan.features.view(4, 6, 3), torch.from_numpy(expected), rtol=1e-4, atol=1e-5
    )


def test_the_whole_grid_is_the_identity():
    tokens = make_tokens(2, grid=(1, 4, 5))
    torch.testing.assert_close(
        Fourier(values="features").plan(tokens, 20).features, tokens.features
    )


def test_projector_inputs_are_resampled_and_then_projected():
    tokens = make_tokens(2, grid=(1, 4, 4))
    plan = Fourier().plan(tokens, 4)
    inner = only(features=tokens.vision_features, grid=tokens.grid)
    mixed = Fourier(values="features").plan(inner, 4).features
    torch.testing.assert_close(plan.features, tokens.projector(mixed))


# --- average pooling


def test_average_pooling_worked_example():
    plan = AvgPool().plan(grid_tokens(ramp()), 4)
    assert plan.features.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize(("large", "small"), [(24, 12), (24, 7), (5, 4), (10, 3), (9, 9), (3, 1)])
def test_average_pooling_windows_are_those_of_torch(large, small):
    x = torch.randn(large, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = F.adaptive_avg_pool1d(x[None], small)[0]
    torch.testing.assert_close(window_means(large, small) @ x, expected)


# --- all of them


@pytest.mark.parametrize(
    "method", [Fourier(), AvgPool(), AvgPool(values="vision_features")], ids=str
)
def test_gradients_reach_every_token(method):
    tokens = make_tokens(1, grid=(1, 4, 6))
    source = tokens.features if method.values == "features" else tokens.vision_features
    source.requires_grad_()
    method.plan(tokens, 6).features.square().sum().backward()
    assert (source.grad.abs().sum(dim=-1) > 0).all()


def test_a_grid_first_seen_in_inference_mode_serves_gradients():
    tokens = make_tokens(1, grid=(2, 5, 11))
    with torch.inference_mode():
        AvgPool().plan(tokens, 26)
    tokens.features.requires_grad_()
    AvgPool().plan(tokens, 26).features.sum().backward()
    assert (tokens.features.grad != 0).all()


def test_frames_are_resampled_one_by_one():
    tokens = make_tokens(2, grid=(3, 4, 4))
    plan = AvgPool().plan(tokens, 12)
    for frame in range(3):
        part = slice(16 * frame, 16 * frame + 16)
        alone = replace(make_tokens(2, grid=(1, 4, 4)), features=tokens.features[:, part])
        expected = AvgPool().plan(alone, 4)
        assert torch.equal(plan.keep[:, 4 * frame : 4 * frame + 4] - 16 * frame, expected.keep)
        torch.testing.assert_close(plan.features[:, 4 * frame : 4 * frame + 4], expected.features)


@pytest.mark.parametrize("trim", [{}, {"top": 1}, {"left": 2}], ids=str)
def test_values_stand_where_the_centres_of_their_cells_were(trim):
    crops = anyres(side=4, rows=2, cols=2, **trim)
    # features tell sub-image, row and column; newlines -1
    places = torch.stack([crops.segment, crops.row, crops.col], dim=1).float()
    tokens = only(features=places[None], crops=crops)
    num_keep = int((crops.segment == -1).sum()) + 20
    plan = AvgPool().plan(tokens, num_keep)
    at = places[plan.keep[0]]
    assert torch.equal(plan.features[0, :, 0], at[:, 0])  # in its own sub-image
    assert (plan.features[0] - at).abs().max() <= 1  # near its centre
    newline = at[:, 0] == -1
    assert newline.sum() == (crops.segment == -1).sum()
    assert torch.equal(plan.features[0, newline], at[newline])
    # two-dimensional uniform sampling keeps the same places, as they are
    assert torch.equal(Uniform(dims=2).plan(tokens, num_keep).keep, plan.keep)


def test_small_budgets_drop_newlines_and_then_sub_images():
    crops = anyres(side=4, rows=2, cols=2)
    tokens = make_tokens(1, crops=crops)
    for num_keep in range(1, 12):
        plan = AvgPool().plan(tokens, num_keep)
        assert 1 <= plan.keep.shape[1] <= num_keep
        assert (crops.segment[plan.keep] >= 0).all()


@pytest.mark.parametrize("method", [Fourier(), AvgPool(), Uniform(dims=2)], ids=lambda m: m.name)
def test_tokens_without_a_grid_are_refused(method):
    with pytest.raises(UnsupportedMethodError, match="known grid"):
        method.plan(make_tokens(1, 12), 4)


def test_a_ragged_layout_is_refused():
    crops = anyres(side=3, rows=1, cols=1, newlines=False)
    ragged = CropLayout(segment=crops.segment[:-1], row=crops.row[:-1], col=crops.col[:-1])
    with pytest.raises(UnsupportedMethodError, match="full rectangles, got 8 tokens on 3 x 3"):
        AvgPool().plan(make_tokens(1, crops=ragged), 8)


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("cls", "bad"),
    [
        (Fourier, {"rescale": 1}),
        (Fourier, {"values": "keys"}),
        (AvgPool, {"values": None}),
        (Uniform, {"dims": 3}),
        (Uniform, {"dims": True}),
    ],
)
def test_bad_hyper_parameters_are_refused(cls, bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        cls(**bad)
