"""Images of one forward call: where their tokens stand, and buckets of images that look alike."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vispress.adapters.base import Modality
from vispress.devices import sent
from vispress.errors import CompressionStateError
from vispress.types import CropLayout, Memory, Need

if TYPE_CHECKING:
    from vispress.runtime.encoder.capture import EncoderCapture


@dataclass(eq=False)
class Image:
    """One image or video in the prompt.

    Args:
        sample: Row of the batch.
        modality: Image or video.
        positions: `[N0]` int64 on the host, logical positions within the chunk, ascending.
        capture: What the encoder call gave, with this image's place in it.
        number: Place in the capture.
        grid: `(t, h, w)` of a plain raster, or None.
        crops: Geometry otherwise.
        text_after: `[Q]` int64 on the host, positions of valid text behind the image.
        text_count: Valid text tokens of the sample's chunk.
        last: Whether no other image stands behind it in its sample (noted where it matters).
        paired_text: `[D]`, mean embedding of the text that belongs to it (likewise).
    """

    sample: int
    modality: Modality
    positions: Tensor
    capture: "EncoderCapture"
    number: int
    grid: tuple[int, int, int] | None
    crops: CropLayout | None
    text_after: Tensor
    text_count: int
    last: bool = True
    paired_text: Tensor | None = None
    trace: list["Trace"] = field(default_factory=list)

    @property
    def num_visual(self) -> int:
        """Tokens at the start (N0)."""
        return len(self.positions)

    def likeness(self, *, by_text: bool) -> tuple[object, ...]:
        """Images with equal likeness share a bucket; `by_text`: their texts must be as
        long, too. A sample's last image and the others do not mix where that was noted.
        """
        layout: tuple[object, ...] = ()
        if self.crops is not None:
            layout = tuple(
                tuple(part.tolist())
                for part in (self.crops.segment, self.crops.row, self.crops.col)
            )
        text = (len(self.text_after), self.text_count) if by_text else ()
        return (self.num_visual, self.grid, layout, self.modality, self.last, text)


@dataclass
class Trace:
    """What one placement kept of one image; tensors stay on the device until a report is
    asked for.
    """

    step: int
    index: Tensor
    """`[K]` raster indices of what was kept."""


@dataclass(eq=False)
class Bucket:
    """Images that are handled as one batch: equal N0, geometry and current N.

    Args:
        images: One a row.
        sample: `[Bk]` int64, row of the batch.
        positions: `[Bk, N]` int64, logical positions within the chunk of the tokens still there.
        index: `[Bk, N]` int64, their raster index.
    """

    images: list[Image]
    sample: Tensor
    positions: Tensor
    index: Tensor
    entered: dict[int, int] = field(default_factory=dict)
    """N at the first placement of each compressor, by its number."""
    memory: dict[int, tuple[Memory, ...]] = field(default_factory=dict)
    """What each compressor left for each row, by its number."""

    @property
    def num_visual(self) -> int:
        """Tokens now (N)."""
        return self.positions.shape[1]

    def kept(self, keep: Tensor) -> "Bucket":
        """The bucket after `keep [Bk, K]`."""
        return replace(
            self, positions=self.positions.gather(1, keep), index=self.index.gather(1, keep)
        )

    def row(self, number: int) -> "Bucket":
        """One image of the bucket."""
        one = slice(number, number + 1)
        return replace(
            self,
            images=self.images[one],
            sample=self.sample[one],
            positions=self.positions[one],
            index=self.index[one],
            memory={by: own[one] for by, own in self.memory.items()},
        )

    def passes(self, needs: Need | None) -> bool:
        """Whether a method that is made for `needs` leaves these images whole."""
        return needs == "video" and self.images[0].modality != "video"

    def over(self, compressor: int) -> bool:
        """Whether a compressor is done with all rows."""
        own = self.memory.get(compressor, ())
        return bool(own) and all(each.over for each in own)

    def reads_attention(self, compressor: int) -> bool:
        """Whether a compressor's next placement reads attention of the LLM for any row."""
        own = self.memory.get(compressor, ())
        return not own or any(each.attention and not each.over for each in own)

    def to(self, device: torch.device) -> "Bucket":
        """The same bucket on another device."""
        if self.positions.device == device:
            return self
        return replace(
            self,
            sample=self.sample.to(device),
            positions=self.positions.to(device),
            index=self.index.to(device),
        )


def make_buckets(images: Sequence[Image], device: torch.device, *, by_text: bool) -> list[Bucket]:
    """Group images by likeness, in order of appearance."""
    groups: dict[tuple[object, ...], list[Image]] = {}
    for image in images:
        groups.setdefault(image.likeness(by_text=by_text), []).append(image)
    buckets = []
    for group in groups.values():
        sample = torch.tensor([image.sample for image in group])
        positions = torch.stack([image.positions for image in group])
        # one copy to the device for both
        both = sent(torch.cat([sample[:, None], positions], dim=1), device)
        sample, positions = both[:, 0], both[:, 1:]
        index = torch.arange(positions.shape[1], device=device).expand(positions.shape)
        buckets.append(Bucket(group, sample, positions, index))
    return buckets


def numbered(images: Sequence[Image]) -> tuple[dict[Image, int], Counter[int]]:
    """Place of each image among those of its sample, and how many each sample has."""
    seen: Counter[int] = Counter()
    places = {}
    for image in images:
        places[image] = seen[image.sample]
        seen[image.sample] += 1
    return places, seen


def find_images(
    marks: Tensor, valid: Tensor, captures: Sequence["EncoderCapture"], codes: dict[Modality, int]
) -> list[Image]:
    """Give each captured image its placeholder positions, in the model's own order.

    Args:
        marks: `[B, Q]` int64 on the host: 0 for text, else the modality's code.
        valid: `[B, Q]` bool on the host, False on padding.
        captures: One encoder call a modality.
        codes: Code of each modality in `marks`.

    Raises:
        CompressionStateError: Placeholders and features do not fit (a chunk cuts an image in two).
    """
    images: list[Image] = []
    text = valid & (marks == 0)
    for capture in captures:
        where = (marks == codes[capture.modality]).nonzero()
        numbers = _expansion(where, capture, marks.shape[0])
        start = 0
        for number in numbers:
            end = start + capture.counts[number]
            samples = where[start:end, 0]
            if len(samples) < capture.counts[number] or int(samples[0]) != int(samples[-1]):
                raise _mismatch(len(where), capture)
            sample, positions = int(samples[0]), where[start:end, 1]
            behind = text[sample].nonzero()[:, 0]
            grid, crops = capture.layouts[number]
            images.append(
                Image(
                    sample, capture.modality, positions, capture, number, grid, crops,
                    behind[behind > positions[-1]], len(behind),
                )
            )  # fmt: skip
            start = end
        if start != len(where):
            raise _mismatch(len(where), capture)
    return sorted(images, key=lambda image: (image.sample, int(image.positions[0])))


def _expansion(where: Tensor, capture: "EncoderCapture", batch: int) -> list[int]:
    """Order of captured images in the batch; `generate` repeats samples for beams.

    Each sample is repeated in place, and its whole group of images with it: `[A, B, A, B, C, C]`.
    """
    total = sum(capture.counts)
    if len(where) == total or total == 0 or len(where) % total:
        return list(range(len(capture.counts)))
    times = len(where) // total
    if batch % times:
        raise _mismatch(len(where), capture)
    per_sample = torch.bincount(where[:, 0], minlength=batch).tolist()
    order: list[int] = []
    number = 0
    for sample in range(0, batch, times):
        group, left = [], per_sample[sample]
        while left > 0 and number < len(capture.counts):
            group.append(number)
            left -= capture.counts[number]
            number += 1
        order += group * times
    return order


def _mismatch(found: int, capture: "EncoderCapture") -> CompressionStateError:
    return CompressionStateError(
        f"{found} {capture.modality} placeholders do not fit features of {list(capture.counts)} "
        "tokens: a "
        "compressed prefill must see whole images (chunked prefill, prefill_chunk_size, is not "
        "supported)"
    )
