"""Resized patch embeddings against the old ones on resized patches, and against naive resizing."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vispress.errors import ConfigError
from vispress.patch_embedding import bilinear, resize_patch_embed


def embedding(patch: int, **kwargs: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, 8, patch, stride=patch, dtype=torch.float64, **kwargs)  # type: ignore[arg-type]


def resized(x: Tensor, size: int) -> Tensor:
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


def patches(count: int, size: int, smooth: int | None = None) -> Tensor:
    """Random patches; smooth ones come from a few random pixels."""
    generator = torch.Generator().manual_seed(1)
    few = size if smooth is None else smooth
    x = torch.randn(count, 3, few, few, dtype=torch.float64, generator=generator)
    if smooth is None:
        return x
    return F.interpolate(x, size=(size, size), mode="bicubic", align_corners=True)


@pytest.mark.parametrize(("old", "new"), [(14, 15), (14, 16), (14, 28), (7, 13), (1, 3), (10, 10)])
def test_where_patches_grow_outputs_are_equal(old: int, new: int) -> None:
    conv, x = embedding(old), patches(50, old)
    again = resize_patch_embed(conv, new)
    assert torch.allclose(again(resized(x, new)), conv(x), atol=1e-9)


def test_a_picture_is_embedded_patch_by_patch() -> None:
    conv = embedding(4)
    again = resize_patch_embed(conv, 6)
    x = torch.randn(2, 3, 2, 3, 4, 4, dtype=torch.float64)  # batch, channel, grid, patch
    picture = x.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 8, 12)
    flat = x.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    larger = resized(flat, 6).view(2, 2, 3, 3, 6, 6).permute(0, 3, 1, 4, 2, 5)
    assert torch.allclose(again(larger.reshape(2, 3, 12, 18)), conv(picture), atol=1e-9)


@pytest.mark.parametrize(("smooth", "least"), [(4, 0.99), (6, 0.965)])
def test_where_patches_shrink_it_is_nearer_than_a_resized_kernel(smooth: int, least: float) -> None:
    """14 to 10 on smooth patches; the kernel resized as a picture is what one would do at first."""
    conv, x = embedding(14, bias=False), patches(400, 14, smooth)
    wanted = conv(x).flatten()
    naive = nn.Conv2d(3, 8, 10, stride=10, bias=False, dtype=torch.float64)
    naive.weight.data = resized(conv.weight.data, 10)
    ours, theirs = (
        torch.corrcoef(torch.stack([wanted, one(resized(x, 10)).flatten()]))[0, 1].item()
        for one in (resize_patch_embed(conv, 10), naive)
    )
    assert ours > least
    assert ours > theirs + 0.03


def test_the_kernel_is_the_least_squares_one() -> None:
    """`pinv(B^T) w` with the whole matrix of a resized patch, column by column."""
    units = torch.eye(25, dtype=torch.float64).view(25, 1, 5, 5)
    whole = resized(units, 3).flatten(1).mT  # [9, 25]
    conv = embedding(5)
    expected = torch.linalg.lstsq(whole.mT, conv.weight.flatten(2).flatten(0, 1).mT).solution
    found = resize_patch_embed(conv, 3).weight.flatten(2).flatten(0, 1).mT
    assert torch.allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize(("old", "new"), [(14, 10), (5, 9), (3, 3)])
def test_the_matrix_is_what_torch_does(old: int, new: int) -> None:
    x = torch.randn(2, 1, old, old, dtype=torch.float64)
    matrix = bilinear(old, new)
    assert torch.allclose(matrix @ x @ matrix.mT, resized(x, new), atol=1e-12)


def test_all_else_is_as_it_was() -> None:
    conv = embedding(14).to(torch.bfloat16).eval()
    conv.weight.requires_grad_(False)
    before = conv.weight.clone()
    new = resize_patch_embed(conv, 10)
    assert (new.kernel_size, new.stride, new.weight.dtype) == ((10, 10), (10, 10), torch.bfloat16)
    assert torch.equal(new.bias, conv.bias)  # type: ignore[arg-type]
    assert new.bias is not conv.bias
    assert not new.weight.requires_grad
    assert new.bias.requires_grad  # type: ignore[union-attr]
    assert not new.training
    assert torch.equal(conv.weight, before)
    assert resize_patch_embed(embedding(14, bias=False), 10).bias is None


@pytest.mark.parametrize(
    ("conv", "size", "says"),
    [
        (embedding(4), 0, "new_patch must be an integer >= 1, got 0"),
        (embedding(4), 2.5, "new_patch must be"),
        (nn.Conv3d(3, 8, 2, stride=2), 4, "must be a Conv2d, got a Conv3d"),
        (nn.Linear(3, 8), 4, "must be a Conv2d"),
        (nn.Conv2d(3, 8, 4, stride=2), 4, "a square kernel that is its stride"),
        (nn.Conv2d(3, 8, (4, 2), stride=(4, 2)), 4, "a square kernel"),
        (nn.Conv2d(3, 8, 4, stride=4, padding=1), 4, "without padding"),
        (nn.Conv2d(3, 6, 4, stride=4, groups=3), 4, "groups"),
    ],
)
def test_what_is_no_patch_embedding_is_refused(conv: nn.Module, size: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resize_patch_embed(conv, size)  # type: ignore[arg-type]
