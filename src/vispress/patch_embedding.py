"""Finer or coarser patches of a trained vision encoder, without training it again.

After the refined patch embedding of LLaVA-UHD v3, 2025, arXiv:2511.21150, whose rule is FlexiViT's
(arXiv:2212.08013).
Source: the paper and the authors' code, read through a specification.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vispress.checks import check_integer
from vispress.errors import ConfigError


def resize_patch_embed(conv: nn.Conv2d, new_patch: int) -> nn.Conv2d:
    """Make a patch embedding for patches of another size that gives what the old one gave.

    With `B` the matrix of bilinear resizing from old patches to new ones, the new kernel is
    `pinv(B^T) w`: its product with `B x` is nearest to that of `w` with `x`. Where patches grow the
    two are equal; where they shrink, what is lost is what no new patch can hold. Computed once, in
    fp64. Position embeddings are another matter: a picture of as many new patches needs none, any
    other its model's own interpolation (`interpolate_pos_encoding` in transformers).

    Args:
        conv: The old embedding: a square kernel `P x P` that is also its stride. Not modified.
        new_patch: P', pixels along the side of a new patch, at least 1.

    Returns:
        An embedding of its own with kernel and stride P', the old bias, dtype and device, and
        `requires_grad` as in the old one.

    Raises:
        ConfigError: The convolution is no patch embedding, or the size no integer of at least 1.
    """
    check_integer("new_patch", new_patch, low=1)
    if not isinstance(conv, nn.Conv2d):
        raise ConfigError(
            f"conv must be a Conv2d, got a {type(conv).__name__}; patches in time (Conv3d, "
            "Qwen-VL) are not resized"
        )
    patch = conv.kernel_size[0]
    plain = conv.padding in ((0, 0), "valid") and conv.dilation == (1, 1) and conv.groups == 1
    if conv.kernel_size != (patch, patch) or conv.stride != conv.kernel_size or not plain:
        raise ConfigError(
            "conv must be a patch embedding, with a square kernel that is its stride and without "
            f"padding, dilation and groups; got {conv}"
        )
    # both axes alike: pinv of a Kronecker product is that of its factors
    inverse = torch.linalg.pinv(bilinear(patch, new_patch).mT)
    old = conv.weight
    with torch.no_grad():
        inverse = inverse.to(old.device)
        kernel = torch.einsum("ap,bq,oipq->oiab", inverse, inverse, old.double())
        new = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            new_patch,
            stride=new_patch,
            bias=conv.bias is not None,
            device=old.device,
            dtype=old.dtype,
        )
        new.weight.copy_(kernel)
        if conv.bias is not None and new.bias is not None:
            new.bias.copy_(conv.bias)
            new.bias.requires_grad_(conv.bias.requires_grad)
    new.weight.requires_grad_(old.requires_grad)
    return new.train(conv.training)


def bilinear(size: int, new_size: int) -> Float[Tensor, "new_size size"]:
    """Write bilinear resizing of one axis as a matrix, fp64 on the host.

    As `torch.nn.functional.interpolate` without aligned corners and without antialiasing.
    """
    rows = torch.eye(size, dtype=torch.float64, device="cpu")[:, None]
    return F.interpolate(rows, size=new_size, mode="linear", align_corners=False)[:, 0].mT
