"""The weights of projectors that methods may compute with: an MLP, and a norm before it."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchNorm:
    """A LayerNorm or RMS norm of each of the patches that a token input is made of.

    Args:
        patches: Equal parts P of a token input, each normed on its own; 1 for the whole.
        weight: `[Dv / P]`.
        bias: `[Dv / P]`, or None.
        eps: Added to the mean of squares.
        layer: A LayerNorm, which takes the mean off first; else an RMS norm.
    """

    patches: int
    weight: Float[Tensor, "d"]
    bias: Float[Tensor, "d"] | None
    eps: float
    layer: bool

    def centre(self, x: Float[Tensor, "n Dv"]) -> Float[Tensor, "P n d"]:
        """The patches of token inputs, or of changes to them, with the mean taken off."""
        parts = torch.unflatten(x, 1, (self.patches, -1))
        if self.layer:
            parts = parts - parts.mean(dim=2, keepdim=True)
        return parts.transpose(0, 1)

    def to(self, device: torch.device | str) -> "PatchNorm":
        """The same weights on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)


@dataclass(frozen=True, kw_only=True, eq=False)
class TwoLayer:
    """The weights of a projector that is exactly `w2 act(w1 norm(x) + b1) + b2`, and nothing else.

    It says the same as the callable beside it, to methods that share work between its calls.

    Args:
        w1: `[Dh, Dv]`, as `nn.Linear` has it; any floating dtype.
        b1: `[Dh]`, or None.
        w2: `[D, Dh]`.
        b2: `[D]`, or None.
        activation: `"gelu"` (exact) or `"gelu_tanh"`.
        norm: Of the patches of x; None where there is no norm.
    """

    w1: Float[Tensor, "Dh Dv"]
    b1: Float[Tensor, "Dh"] | None
    w2: Float[Tensor, "D Dh"]
    b2: Float[Tensor, "D"] | None
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    norm: PatchNorm | None = None

    def to(self, device: torch.device | str) -> "TwoLayer":
        """The same weights on another device."""
        b1, b2 = (None if b is None else b.to(device) for b in (self.b1, self.b2))
        norm = None if self.norm is None else self.norm.to(device)
        w1, w2 = self.w1.to(device), self.w2.to(device)
        return replace(self, w1=w1, b1=b1, w2=w2, b2=b2, norm=norm)
