"""What is merged inside the vision encoder in one call."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vispress.adapters.base import Modality, ModelAdapter
from vispress.budget import allocate
from vispress.devices import sent
from vispress.methods.base import upcast
from vispress.methods.encoder_merger import EncoderTokens
from vispress.runtime.encoder_step import EncoderStep, check_attention
from vispress.runtime.sequences import Packed, Sequences
from vispress_kernels import Backend
from vispress_kernels.gather_tokens import gather_tokens
from vispress_kernels.merge_tokens import merge_tokens


class EncoderMerge:
    """What is merged in one call of `get_image_features` or `get_video_features`.

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
        self.sizes: Sequence[Sequence[int]] = ()
        """Tokens of each sequence of each image, before any merge."""
        self.counts: list[list[int]] = []
        """Tokens of each sequence that leave each layer."""
        self.order: Tensor | None = None
        self.place: Tensor | None = None  # [B, n0], where each token is now
        self.layer = -1
        self.done = True
        self._keys: list[Tensor] = []

    # --- the course of a call

    def enter(self, number: int, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A layer is about to run: note it, and hand it what fits the tokens that are left."""
        kwargs = dict(kwargs)
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if number == 0:
            hidden = self._start(hidden)
        self.layer, self._keys, self._read = number, [], 0
        if not self.done and self.adapter.packed and self.size is not None:
            kwargs = kwargs | self.layout.arguments(kwargs, self.unit)
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
        device = hidden.device
        self._merges = sent(torch.tensor(merges), device)
        self._counts = sent(torch.tensor(self.counts), device)
        self.layout = (Packed if packed else Sequences)(flat, device)
        self.place = self.layout.all_tokens()
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
        """Whether the layer that runs merges tokens."""
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
        bias = size_bias(self.size, self.unit, self.prefix)
        bias = bias[..., start : self._read].to(key.dtype)
        return bias if mask is None else mask + bias

    @torch.no_grad()
    def decide(self) -> None:
        """Which tokens of this layer are merged, from the keys that its attention was given."""
        keys = upcast(torch.cat(self._keys, dim=2))
        cls, patches = keys[:, :, : self.prefix], keys[:, :, self.prefix :]
        tokens = torch.unflatten(patches, 2, (-1, self.unit)).mean(dim=3)
        counts, merges = self._counts[self.layer], self._merges[self.layer]
        tokens = self.layout.apart(tokens)
        seen = EncoderTokens(
            keys=torch.cat([cls, tokens], dim=2) if self.prefix else tokens,
            count=counts + self.prefix,
            merges=merges,
            has_cls=bool(self.prefix),
            backend=self.backend,
        )
        into = self.step.merger.fold(seen)[:, self.prefix :]
        into = torch.where(into < 0, -1, into - self.prefix)
        self.into = self.layout.folded(into, self.counts[self.layer + 1])
        self.left = self.layout.length
        old = torch.ones(self.into.shape, device=keys.device) if self.size is None else self.size
        target = self.into.clamp(min=0)
        old = old.masked_fill(self.into < 0, 0.0)
        total = old.new_zeros(len(old), self.left).scatter_add(1, target, old)
        self.weight, self._total = old / total.gather(1, target), total

    def merge(self, x: Tensor) -> Tensor:
        """`[B, p + n, D]` (or `[S, D]`) merged as decided; differentiable."""
        x, cls, shape = self._apart(x)
        tokens = torch.unflatten(x, 1, (-1, self.unit)).flatten(2)
        merged = merge_tokens(
            tokens, self.into, self.left, weight=self.weight, backend=self.backend
        )
        return self._joined(merged, cls, shape)

    def expand(self, x: Tensor) -> Tensor:
        """The value of its group for every token that entered the layer."""
        return self._spread(x, self.into.clamp(min=0))

    def leave(self, out: Tensor) -> Tensor:
        """What a layer hands on: merged; behind the last one all places again."""
        if self.done:
            return out
        if self.merges_here:
            out = self.merge(out)
            self.size = self._total
            assert self.place is not None
            self.place = self.into.gather(1, self.place)
            self.layout.advance(self.into)
        if self.layer + 2 == len(self.counts):
            out, self.done = self.restore(out), True
        return out

    def restore(self, x: Tensor) -> Tensor:
        """Every patch in its place, with the value of its group."""
        if self.place is None:
            return x
        x = self._spread(x, self.place)
        if self.order is None:
            return x
        back = self.order.argsort()
        return torch.cat([x[:, : self.prefix], x[:, self.prefix :][:, back]], dim=1)

    def _spread(self, x: Tensor, index: Tensor) -> Tensor:
        x, cls, shape = self._apart(x)
        tokens = torch.unflatten(x, 1, (-1, self.unit)).flatten(2)
        return self._joined(gather_tokens(tokens, index, backend=self.backend), cls, shape)

    def _apart(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        dims = x.ndim
        x = x[None] if dims == 2 else x
        return x[:, self.prefix :], x[:, : self.prefix], dims

    def _joined(self, tokens: Tensor, cls: Tensor, dims: int) -> Tensor:
        x = torch.unflatten(tokens, 2, (self.unit, -1)).flatten(1, 2)
        x = torch.cat([cls, x], dim=1) if self.prefix else x
        return x[0] if dims == 2 else x

    # --- what is told afterwards

    def groups(self) -> Tensor | None:
        """`[P, n, 1]` (or `[S, 1]`) number above 0 of each patch's group; None: nothing merged."""
        if self.place is None:
            return None
        names = self.place + 1
        if not self.adapter.packed:  # sequences of one image have names of their own
            numbers = [number for sizes in self.sizes for number in range(len(sizes))]
            first = sent(torch.tensor(numbers), names.device) * names.shape[1]
            names = names + first[:, None]
        names = names.repeat_interleave(self.unit, dim=1)
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
    bias = size.log().repeat_interleave(unit, dim=1)
    return torch.cat([bias.new_zeros(len(bias), prefix), bias], dim=1)[:, None, None]
