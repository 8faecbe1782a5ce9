"""Layers of small networks that rank tokens: whatever the model's precision, they compute in fp32.

They are no `nn.Linear`, which adapters of PEFT would wrap, and widen what they are given and their
own weights (`upcast`), so that a model in half precision ranks as the parameters say.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from vispress.methods.base import upcast

HEAD = 128
"""Width of a head of `CrossAttention`, about."""


class Dense(nn.Module):
    """Map the last axis linearly, in at least fp32.

    Args:
        width_in: Of the input.
        width_out: Of the output.
        zero: Whether to begin with zeros, in place of a uniform draw within 1 / sqrt(width_in).
    """

    def __init__(self, width_in: int, width_out: int, *, zero: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width_out, width_in))
        self.bias = nn.Parameter(torch.zeros(width_out))
        if not zero:
            nn.init.uniform_(self.weight, -1 / math.sqrt(width_in), 1 / math.sqrt(width_in))

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """Map tokens."""
        x = upcast(x)
        return F.linear(x, self.weight.to(x), self.bias.to(x))


class Norm(nn.Module):
    """Normalise the last axis to mean 0 and deviation 1, then scale and shift it.

    Args:
        width: Of the axis.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Normalise tokens, in at least fp32."""
        x = upcast(x)
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x), self.bias.to(x))


class Attend(nn.Module):
    """Let tokens take from others what fits them, added to what they are.

    Args:
        width: Of both.
        heads: A divisor of it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_to, self.norm_from = Norm(width), Norm(width)
        self.query, self.key_value = Dense(width, width), Dense(width, 2 * width)
        self.out = Dense(width, width)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        others: Float[Tensor, "B M D"],
        valid: Bool[Tensor, "B M"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Add what `x` finds in the others; without others, nothing.

        Args:
            x: Tokens.
            others: Where they look.
            valid: False on padding of the others; each row has a valid one.
        """
        if not others.shape[1]:
            return x
        parts = [self.query(self.norm_to(x)), *self.key_value(self.norm_from(others)).chunk(2, -1)]
        query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        mask = None if valid is None else valid[:, None, None]
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        added: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return x + added


class CrossAttention(nn.Module):
    """Let queries find values by keys, as they are, by heads of about 128.

    Args:
        width: Of all of them.
        std: Deviation of the weights at first.
    """

    def __init__(self, width: int, std: float) -> None:
        super().__init__()
        self.heads = next(h for h in range(max(1, width // HEAD), 0, -1) if width % h == 0)
        self.query, self.key, self.value, self.out = (Dense(width, width) for _ in range(4))
        for dense in (self.query, self.key, self.value, self.out):
            nn.init.trunc_normal_(dense.weight, std=std)

    def forward(
        self,
        queries: Float[Tensor, "B M D"],
        keys: Float[Tensor, "B N D"],
        values: Float[Tensor, "B N D"],
    ) -> Float[Tensor, "B M D"]:
        """Attend; among none, find zeros."""
        if not keys.shape[1]:
            return torch.zeros_like(queries)
        parts = self.query(queries), self.key(keys), self.value(values)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        found = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Add to each token a two-layer MLP of itself.

    Args:
        width: Of the tokens; twice as much inside.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            Norm(width),
            Dense(width, 2 * width),
            Dense(2 * width, width),
        )

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Change tokens one by one."""
        added: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return upcast(x) + added


def places(length: int, width: int, like: Tensor) -> Float[Tensor, "T D"]:
    """Make sinusoids of positions, of period 2 pi to 2 pi 1000, of any length.

    Args:
        length: T.
        width: D, even.
        like: For dtype and device.
    """
    rates = torch.logspace(0, -3, width // 2, device=like.device, dtype=like.dtype)
    angles = torch.arange(length, device=like.device, dtype=like.dtype)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
