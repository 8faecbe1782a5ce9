"""PVC, by hand: what a window becomes, and which places stay."""

import math

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, only

from vispress.errors import ConfigError, UnsupportedMethodError
from vispress.methods import PVC
from vispress.methods.pvc import WindowPool, WindowPools
from vispress.types import ModuleShape

SHAPE = ModuleShape(
    width=8, vision_width=6, num_layers=4, num_heads=2, vision_layers=4, encoder_width=4
)


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def test_a_window_is_weighted_channel_by_channel() -> None:
    """Two channels; the hidden layer takes x_1 - mean_1, the logits are 2 and -1 times its GELU."""
    pool = WindowPool(2)
    with torch.no_grad():
        pool.hidden.weight.copy_(torch.tensor([[1.0, 0.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
        pool.logits.weight.copy_(torch.tensor([[2.0, 0.0], [-1.0, 0.0]]))
    x = [(0.0, 5.0), (1.0, 6.0), (2.0, 7.0), (5.0, 8.0)]  # the first channel's mean is 2
    activations = [gelu(value - 2.0) for value, _ in x]
    expected = []
    for channel, factor in ((0, 2.0), (1, -1.0)):
        weights = [math.exp(factor * a) for a in activations]
        mixed = sum(w * each[channel] for w, each in zip(weights, x, strict=True))
        expected.append(mixed / sum(weights))
    found = pool(torch.tensor([[x]]))
    assert found.shape == (1, 1, 2)
    assert found[0, 0].tolist() == pytest.approx(expected, rel=1e-5)
    assert expected[0] > 4.9
    assert expected[1] < 6.4  # the other way


def test_it_begins_as_average_pooling_and_every_layer_learns_within_two_steps() -> None:
    pool = PVC().make_module(SHAPE)
    assert isinstance(pool, WindowPools)
    windows = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for number in (0, 1):
        torch.testing.assert_close(pool(windows, number), windows.mean(dim=2))
    moved = dict(pool.named_parameters())
    wanted = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    grew: set[str] = set()
    for _ in range(2):
        loss = sum((pool(windows, number) - wanted).square().sum() for number in (0, 1))
        found = torch.autograd.grad(loss, list(moved.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(moved.items(), found, strict=True):
                grew |= {name} if gradient.abs().max() > 1e-6 else set()
                parameter -= 0.1 * gradient
    # a softmax does not see what is added to all of its logits
    assert grew == {name for name in moved if name != "0.logits.bias" and name != "1.logits.bias"}


def kept(method: PVC, **tokens: object) -> list[int]:
    shown = make_tokens(batch=1, **tokens)  # type: ignore[arg-type]
    plan = method.plan(shown, shown.num_visual)
    assert plan.features is not None
    assert torch.equal(plan.features, shown.features[:, plan.keep[0]])
    return plan.keep[0].tolist()  # type: ignore[no-any-return]


def test_one_place_a_window_stays() -> None:
    once = PVC(after=(1,))
    assert kept(once, grid=(1, 4, 4)) == [0, 2, 8, 10]
    assert kept(PVC(after=(1, 2)), grid=(1, 4, 8)) == [0, 4]
    assert kept(once, grid=(2, 2, 4)) == [0, 2, 8, 10]


def test_crops_keep_their_own_windows_and_a_newline_a_row_of_them() -> None:
    """A thumbnail of 4 x 4 and a line of two crops, of which rows 1 and 2 are left unpadded.

    Two lines of the stitched grid, 8 tokens and a newline each.
    """
    crops = anyres(4, 1, 2, top=1)
    assert len(crops.segment) == 16 + 2 * 9
    thumbnail, first, second = [0, 2, 8, 10], 16, 16 + 9
    # row 1 is what is left of the upper windows, row 2 begins the lower ones
    expected = [*thumbnail, *(first + at for at in (0, 2, 4, 6, 8))]
    expected += [second + at for at in (0, 2, 4, 6, 8)]
    assert kept(PVC(after=(1,)), crops=crops) == expected


@pytest.mark.parametrize(
    ("after", "layers", "behind"),
    [
        (None, 27, (3, 17)),
        (None, 23, (2, 14)),  # LLaVA-1.5: 23 of CLIP's 24 layers give the features
        (None, 3, (0, 1)),
        (None, 2, (0, 1)),
        ((1, 2, 3), 3, (0, 1, 2)),
    ],
)
def test_layers_are_those_that_ran_before(
    after: tuple[int, ...] | None, layers: int, behind: tuple[int, ...]
) -> None:
    assert PVC(after=after).pooled_behind(layers) == behind


@pytest.mark.refusal
def test_layers_that_there_are_not_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"after=\(1, 9\) .* vision encoder has 8 up to"):
        PVC(after=(1, 9)).pooled_behind(8)
    with pytest.raises(ConfigError, match=r"after=None .* \[1, 2\], .* has 1 up to"):
        PVC().pooled_behind(1)
    for bad, match in (((), "non-empty"), ((0,), "integer >= 1"), ((3, 2), "ascending")):
        with pytest.raises(ConfigError, match=f"after must be .*{match}"):
            PVC(after=bad)


@pytest.mark.refusal
def test_an_encoder_of_an_unknown_kind_has_no_width() -> None:
    shape = ModuleShape(width=8, vision_width=6, num_layers=4, num_heads=2, vision_layers=4)
    with pytest.raises(UnsupportedMethodError, match=r"vision encoder, .* of an unknown kind"):
        PVC().make_module(shape)


@pytest.mark.refusal
def test_places_without_a_grid_are_refused() -> None:
    tokens = only(features=torch.zeros(1, 16, 4))
    with pytest.raises(UnsupportedMethodError, match="whole images with a known grid"):
        PVC().plan(tokens, 16)
