"""Give what of a call's tensors belongs to a bucket of images."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vispress.devices import sent
from vispress.runtime.tokens.images import Bucket
from vispress.runtime.tokens.live_tokens import LiveTokens
from vispress_kernels import Backend
from vispress_kernels.gather_tokens import gather_tokens


@dataclass(eq=False)
class BucketView:
    """Hold what of a call's tensors belongs to a bucket."""

    bucket: Bucket
    _local: list[tuple[LiveTokens, Tensor]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Of the bucket's tensors."""
        return self.bucket.index.device

    def own(self, x: Tensor) -> Tensor:
        """`[Bk, ...]` of `[B, ...]`: a row an image; no copy where these are the batch."""
        x, samples = on_device(x, self.device), [image.sample for image in self.bucket.images]
        return x if samples == list(range(len(x))) else x[self.bucket.sample]

    def places(self, rows: LiveTokens, positions: Tensor) -> Tensor:
        """`[Bk, K]`: rows of logical positions that have one."""
        if rows.complete:
            return positions
        if rows.valid is None:
            return torch.searchsorted(self.own(rows.index).contiguous(), positions.contiguous())
        return self.own(rows.place).gather(1, positions)

    def local(self, rows: LiveTokens) -> Tensor:
        """`[Bk, N]`: rows of the tokens that are still there; several signals ask for them."""
        for known, places in self._local:  # not by id: a graph would be of that object alone
            if known is rows:
                return places
        places = self.places(rows, self.bucket.positions)
        self._local.append((rows, places))
        return places

    def behind(self, rows: LiveTokens) -> Tensor:
        """`[Bk, T]`: rows of the text behind each image."""
        text = stacked([image.text_after for image in self.bucket.images])
        return self.places(rows, sent(text, self.device))


def on_device(x: Tensor, device: torch.device) -> Tensor:
    return x if x.device == device else x.to(device)


def stacked(values: Sequence[Tensor]) -> Tensor:
    """Stack as `torch.stack` does, without a copy of a single one."""
    return values[0][None] if len(values) == 1 else torch.stack(list(values))


def pick(x: Tensor, axis: int, index: Tensor, backend: Backend) -> Tensor:
    """Places `index [B, K]` along one axis of `[B, ...]`."""
    return gather_tokens(x.movedim(axis, 1), index, backend=backend).movedim(1, axis)
