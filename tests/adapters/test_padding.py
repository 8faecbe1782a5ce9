"""Padding that is found in pixels: bands of the mean colour at two opposite edges."""

import numpy as np
import pytest
import torch
from PIL import Image

from vispress.adapters.padding import padded_share

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def processed(width, height, side=56, *, noise=0):
    """A noisy picture as LLaVA's processor gives it: padded with the mean colour, resized."""
    pixels = np.random.default_rng(noise).integers(0, 256, (height, width, 3), dtype=np.uint8)
    size, fill = max(width, height), tuple(int(255 * mean) for mean in MEAN)
    square = Image.new("RGB", (size, size), fill)
    square.paste(Image.fromarray(pixels), ((size - width) // 2, (size - height) // 2))
    small = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy((small / 255 - MEAN) / STD).permute(2, 0, 1)[None].float()


def test_bands_of_a_wide_picture_are_shares_of_patches():
    pixels = torch.randn(1, 3, 8, 8) + 1
    pixels[:, :, :3] = 0.01  # the truncated mean colour
    pixels[:, :, -3:] = -0.01
    share = padded_share(pixels, 2)
    assert share[0, :, 0].tolist() == [1.0, 0.5, 0.5, 1.0]
    assert (share == share[:, :, :1]).all()
    assert torch.equal(padded_share(pixels.mT, 2), share.mT)


@pytest.mark.parametrize("size", [(640, 480), (300, 900), (500, 333), (200, 50)], ids=str)
def test_a_processed_picture_shows_its_padding(size):
    width, height = size
    share = padded_share(processed(*size), 4)[0]
    inside = [min(s / max(size), 1.0) * 14 for s in (height, width)]
    found = [float((1 - share).amax(dim=axis).sum()) for axis in (1, 0)]
    # too narrow by what resizing blurs: up to two of four pixels at each end
    for want, have in zip(inside, found, strict=True):
        assert want - 0.01 <= have <= want + 1.01


@pytest.mark.parametrize("size", [(480, 480), (90, 91)], ids=str)
def test_a_square_picture_has_none(size):
    assert float(padded_share(processed(*size), 4).max()) < 0.5


def test_bands_at_one_edge_or_of_another_colour_are_content():
    pixels = torch.randn(3, 3, 8, 8) + 1
    pixels[0, :, :3] = 0.0  # above only: grey sky
    pixels[1, :, :3] = pixels[1, :, -3:] = -1.7  # black bars
    assert not padded_share(pixels, 2).any()


def test_the_narrower_band_counts_and_a_flat_picture_has_none():
    pixels = torch.randn(1, 3, 8, 8) + 1
    pixels[:, :, :4] = pixels[:, :, -2:] = 0.0
    assert padded_share(pixels, 2)[0, :, 0].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert not padded_share(torch.zeros(1, 3, 8, 8), 2).any()


def test_half_precision_finds_the_same():
    pixels = processed(640, 480)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(padded_share(pixels.to(dtype), 4), padded_share(pixels, 4))
