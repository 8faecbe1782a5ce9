"""What the other patches give a patch is what their whole maps say."""

import pytest
import torch

from vispress.runtime.encoder import patch_attention as module
from vispress.runtime.encoder.patch_attention import patch_attention


def drawn(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(2, 2, 3, length, 4, generator=generator, dtype=torch.float64)


def given_by_others(maps: torch.Tensor) -> torch.Tensor:
    """`[B, H, n]` of whole maps `[B, H, n, n]` of patches."""
    n = maps.shape[-1]
    others = maps.masked_fill(torch.eye(n, dtype=torch.bool), 0.0)
    return others.sum(dim=2) / max(1, n - 1)


@pytest.mark.parametrize("has_cls", [True, False])
def test_it_is_the_mean_of_the_other_patches_rows(
    has_cls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS", 5)
    query, key = drawn(12)
    maps = (query @ key.mT * 0.7).softmax(dim=-1)
    expected = given_by_others(maps[:, :, 1:, 1:] if has_cls else maps)
    found = patch_attention(query, key, 0.7, None, int(has_cls), "torch")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_packed_images_give_each_other_nothing() -> None:
    query, key = (x[:1] for x in drawn(12))
    bounds = torch.tensor([0, 1, 5, 12], dtype=torch.int32)
    found = patch_attention(query, key, 0.7, bounds, 0, "torch")
    for start, end in ((0, 1), (1, 5), (5, 12)):
        maps = (query[:, :, start:end] @ key[:, :, start:end].mT * 0.7).softmax(dim=-1)
        expected = given_by_others(maps)
        torch.testing.assert_close(found[..., start:end].double(), expected, rtol=1e-5, atol=1e-7)
