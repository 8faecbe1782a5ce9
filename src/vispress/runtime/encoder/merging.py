"""Merge tokens inside the vision encoder in one call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vispress.adapters.base import Modality, ModelAdapter
from vispress.budget import Budget, allocate
from vispress.devices import sent
from vispress.errors import UnsupportedMethodError
from vispress.methods.base import Compressor, upcast
from vispress.methods.encoder_merger import EncoderMerger, EncoderTokens
from vispress.precision import full_precision
from vispress.runtime.encoder.sequences import Packed, Sequences
from vispress_kernels import Backend
from vispress_kernels.gather_tokens import gather_tokens
from vispress_kernels.merge_tokens import merge_tokens

ALIGNED = 16
"""Bytes; where in memory CUDA's attention reads a mask begins at a multiple."""
IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention that takes numbers to add to its logits."""


@dataclass(frozen=True, eq=False)
class EncoderStep:
    """A placement in the encoder.

    Args:
        method: The compressor.
        merger: What it does there.
        budget: Tokens of an image that should be left at the encoder's end.
    """

    method: Compressor
    merger: EncoderMerger
    budget: Budget


def check_attention(implementation: str) -> None:
    """Refuse attention that cannot weigh merged tokens.

    Raises:
        UnsupportedMethodError: Names what works.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedMethodError(
            "merged tokens add the log of their size to the attention logits, which "
            f"{implementation!r} in the vision encoder cannot; these can: "
            f"{', '.join(IMPLEMENTATIONS)}. For the encoder alone: "
            "model.set_attn_implementation({'vision_config': 'sdpa'})"
        )


class EncoderMerge:
    """Merge tokens in one call of `get_image_features` or `get_video_features`.

    Args:
        adapter: The family.
        step: The placement.
        modality: Image or video.
        call: Arguments of the call by name.
        backend: Kernels to use.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        step: EncoderStep,
        modality: Modality,
        call: Mapping[str, Any],
        backend: Backend,
    ) -> None:
        self.adapter, self.step, self.backend = adapter, step, backend
        self.modality: Modality = modality
        self.call = call
        self.unit = adapter.patches_per_token()
        self.prefix = int(adapter.has_cls)
        self.ahead = self.prefix if self.unit > 1 else 0
        """Rows ahead of tokens: [CLS], which is the first of the tokens where each has one row."""
        self.sizes: Sequence[Sequence[int]] = ()
        """Tokens of each sequence of each image, before any merge."""
        self.counts: list[list[int]] = []
        """Tokens of each sequence that leave each layer."""
        self.order: Tensor | None = None
        self.place: Tensor | None = None  # [B, n0], where each token is now; None: where it was
        self.layer = -1
        self.done = True
        self._keys: list[Tensor] = []
        self._bias: Tensor | None = None  # of the sizes, as the last keys had them added

    # --- the course of a call

    def enter(self, number: int, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A layer is about to run: note it, and hand it what fits the tokens that are left."""
        kwargs = dict(kwargs)
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if number == 0:
            hidden = self._start(hidden)
        self.layer, self._keys, self._read = number, [], 0
        if not self.done and self.adapter.packed and self.size is not None:
            kwargs = kwargs | self.layout.arguments(kwargs)
        return (hidden, *rest), kwargs

    def _start(self, hidden: Tensor) -> Tensor:
        packed, unit = self.adapter.packed, self.unit
        length = 0 if packed else (hidden.shape[1] - self.prefix) // unit
        self.sizes = self.adapter.sequences(self.modality, self.call, length)
        flat = [size for image in self.sizes for size in image]
        rows = len(flat) * max(length, 1) if not packed else sum(flat)
        found = hidden.shape[0] // unit if packed else hidden.shape[0] * length
        assert rows == found, f"{found} encoder tokens, expected {rows}"
        merges = self._schedule()
        self.counts = [flat]
        for row in merges:
            self.counts.append([n - m for n, m in zip(self.counts[-1], row, strict=True)])
        self.done = not any(map(any, merges))
        self.size: Tensor | None = None
        if self.done:
            return hidden
        device, prefix = hidden.device, self.prefix
        shown = [[n + prefix for n in row] for row in self.counts[:-1]], merges
        self._shown, self._sent = shown, sent(torch.tensor(shown), device)
        counts = [[n + prefix - self.ahead for n in row] for row, _ in groupby(self.counts)]
        self.layout = (Packed if packed else Sequences)(counts, device, unit, self.backend)
        self.order = None if packed else self.adapter.patch_order(self.modality, self.call)
        if self.order is None:
            return hidden
        self.order = sent(self.order, device)
        return torch.cat([hidden[:, : self.prefix], hidden[:, self.prefix :][:, self.order]], dim=1)

    def _schedule(self) -> list[list[int]]:
        """`[layers][sequences]` tokens to merge away; an image's budget is split by size."""
        columns = []
        layers = len(self.adapter.encoder_blocks())
        for sizes in self.sizes:
            keep = self.step.budget.resolve(sum(sizes))
            for size, share in zip(sizes, allocate(keep, sizes), strict=True):
                columns.append(self.step.merger.merges_per_layer(size, max(1, share), layers))
        return [list(row) for row in zip(*columns, strict=True)]

    @property
    def merges_here(self) -> bool:
        """Tell whether the layer that runs merges tokens."""
        return not self.done and self.counts[self.layer] != self.counts[self.layer + 1]

    # --- what the layer's parts see

    def attend(self, key: Tensor, mask: Tensor | None, implementation: str) -> Tensor | None:
        """The mask with the log of the sizes on top, for the next keys of the layer."""
        if self.done:
            return mask
        check_attention(implementation)
        if self.merges_here:
            self._keys.append(key.detach())
        start, self._read = self._read, self._read + key.shape[2]
        if self.size is None:
            return mask
        if self._bias is None or self._bias.dtype != key.dtype:
            self._bias = size_bias(self.size, self.unit, self.ahead).to(key.dtype)
        bias = self._bias[..., start : self._read]
        if mask is not None:
            return mask + bias
        return bias.clone() if start * bias.element_size() % ALIGNED else bias

    @torch.no_grad()
    def decide(self) -> None:
        """Which tokens of this layer are merged, from the keys that its attention was given."""
        keys = upcast(torch.cat(self._keys, dim=2) if len(self._keys) > 1 else self._keys[0])
        cls, tokens = keys[:, :, : self.ahead], keys[:, :, self.ahead :]
        if self.unit > 1:
            tokens = torch.unflatten(tokens, 2, (-1, self.unit)).mean(dim=3)
        tokens = self.layout.apart(tokens)
        counts, merges = (numbers[self.layer] for numbers in self._shown)
        seen = EncoderTokens(
            keys=torch.cat([cls, tokens], dim=2) if self.ahead else tokens,
            count=self._sent[0, self.layer] if len(set(counts)) > 1 else None,
            merges=self._sent[1, self.layer] if len(set(merges)) > 1 else merges[0],
            has_cls=bool(self.prefix),
            backend=self.backend,
        )
        with full_precision():
            into = self.step.merger.fold(seen)
        self.into = self.layout.folded(into[:, 1:] - 1 if self.ahead else into)
        self.target = self.into.clamp(min=0) if self.layout.padded else self.into
        self.left = self.layout.left
        old = torch.ones(self.into.shape, device=keys.device) if self.size is None else self.size
        total = old.new_zeros(len(old), self.left).scatter_add_(1, self.target, old)
        self.weight, self._total = old / total.gather(1, self.target), total

    def merge(self, x: Tensor) -> Tensor:
        """`[B, p + n, D]` (or `[S, D]`) merged as decided; differentiable."""
        merged = merge_tokens(
            self._tokens(x), self.into, self.left, weight=self.weight, backend=self.backend
        )
        return self._joined(merged, x)

    def expand(self, x: Tensor) -> Tensor:
        """The value of its group for every token that entered the layer."""
        return self._spread(x, self.target)

    def leave(self, out: Tensor) -> Tensor:
        """Give what a layer hands on: merged; behind the last one all places again."""
        if self.done:
            return out
        if self.merges_here:
            out = self.merge(out)
            self.size, self._bias = self._total, None
            self.place = self.into if self.place is None else self.into.gather(1, self.place)
            self.layout.advance(self.into)
        if self.layer + 2 == len(self.counts):
            out, self.done = self.restore(out), True
        return out

    def restore(self, x: Tensor) -> Tensor:
        """Every patch in its place, with the value of its group."""
        x = x if self.place is None else self._spread(x, self.place)
        if self.order is None:
            return x
        back = self.order.argsort()
        return torch.cat([x[:, : self.prefix], x[:, self.prefix :][:, back]], dim=1)

    def _spread(self, x: Tensor, index: Tensor) -> Tensor:
        return self._joined(gather_tokens(self._tokens(x), index, backend=self.backend), x)

    def _tokens(self, x: Tensor) -> Tensor:
        """`[B, n, unit * D]`"""
        x = x[None] if x.ndim == 2 else x
        return x[:, self.ahead :].reshape(len(x), -1, self.unit * x.shape[2])

    def _joined(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Tokens in the form of `x`, behind what is ahead of them there."""
        if x.ndim == 2:
            return tokens.reshape(-1, x.shape[1])
        tokens = tokens.reshape(len(x), -1, x.shape[2])
        return torch.cat([x[:, : self.ahead], tokens], dim=1) if self.ahead else tokens

    # --- what is told afterwards

    def groups(self) -> Tensor | None:
        """`[P, n, 1]` (or `[S, 1]`) number above 0 of each patch's group; None: nothing merged."""
        if self.place is None:
            return None
        cls = self.prefix - self.ahead
        names = self.place[:, cls:] + (1 - cls)
        if not self.adapter.packed:  # sequences of one image have names of their own
            numbers = [number for sizes in self.sizes for number in range(len(sizes))]
            first = sent(torch.tensor(numbers), names.device) * names.shape[1]
            names = names + first[:, None]
        names = names.repeat_interleave(self.unit, dim=1) if self.unit > 1 else names
        names = names if self.order is None else names[:, self.order.argsort()]
        return (names[0] if self.adapter.packed else names).double().unsqueeze(-1)

    def per_image(self) -> list[tuple[int, ...]]:
        """Tokens of each image that enter the first layer, then that leave each layer."""
        found, start = [], 0
        for sizes in self.sizes:
            end = start + len(sizes)
            found.append(tuple(sum(row[start:end]) for row in self.counts))
            start = end
        return found


def size_bias(size: Tensor, unit: int = 1, prefix: int = 0) -> Tensor:
    """`[B, 1, 1, p + n * unit]` to add to attention logits: the log of what each key stands for.

    Args:
        size: `[B, n]` tokens that each token stands for; 0 is padding, which nothing attends to.
        unit: Patches of a token, each of which stands for as many.
        prefix: Tokens ahead of them that stand for themselves.
    """
    bias = size.log()
    bias = bias.repeat_interleave(unit, dim=1) if unit > 1 else bias
    return (F.pad(bias, (prefix, 0)) if prefix else bias)[:, None, None]
