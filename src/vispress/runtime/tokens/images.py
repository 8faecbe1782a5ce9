"""Keep the images of one call: where their tokens stand, and buckets of images that look alike."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vispress.adapters.base import Modality
from vispress.devices import sent
from vispress.errors import CompressionStateError
from vispress.runtime.layout import Prompt
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
        prompt: What decides about it.
        text: `[T]` int64 on the host, positions of the prompt's valid text, answers left out.
        shown: `[N]` int64 on the host, places of its tokens that are not masked; None for all.
        number_in_prompt: Place among the images of its document, from 0.
        count_in_prompt: Images of the document that stand before the prompt's end.
        last: Whether no other image stands behind it in its prompt (noted where it matters).
        paired_text: `[D]`, mean embedding of the text that belongs to it (likewise).
    """

    sample: int
    modality: Modality
    positions: Tensor
    capture: "EncoderCapture"
    number: int
    grid: tuple[int, int, int] | None
    crops: CropLayout | None
    prompt: Prompt
    text: Tensor
    shown: Tensor | None = None
    number_in_prompt: int = 0
    count_in_prompt: int = 1
    last: bool = True
    paired_text: Tensor | None = None
    trace: list["Trace"] = field(default_factory=list)

    @property
    def num_visual(self) -> int:
        """Tokens at the start (N0), masked ones included."""
        return len(self.positions)

    @property
    def num_shown(self) -> int:
        """Tokens at the start that are not masked."""
        return self.num_visual if self.shown is None else len(self.shown)

    @cached_property
    def text_after(self) -> Tensor:
        """`[S]` int64 on the host, positions of the prompt's text behind the image."""
        return self.text[self.text > self.positions[-1]]

    def likeness(self, *, by_text: bool, by_ends: bool) -> tuple[object, ...]:
        """Images with equal likeness share a bucket.

        A prompt's last image and the others do not mix where that was noted, nor do images that
        something asks about and those that nothing does.

        Args:
            by_text: Their texts must be as long, too.
            by_ends: As many rows must stand for the ends of their prompts.
        """
        layout: tuple[object, ...] = ()
        if self.crops is not None:
            layout = tuple(
                tuple(part.tolist())
                for part in (self.crops.segment, self.crops.row, self.crops.col)
            )
        text = (len(self.text_after), len(self.text)) if by_text else ()
        ends = len(self.prompt.ends) if by_ends else bool(self.prompt.ends)
        size = (self.num_visual, self.num_shown)
        return (size, self.grid, layout, self.modality, self.last, text, ends)


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
    marks: tuple[Tensor, Tensor | None] | None = field(default=None, init=False)
    """`[B, Q]` bool: its tokens; or its tokens before a placement, and those that it dropped."""

    @property
    def num_visual(self) -> int:
        """Tokens now (N)."""
        return self.positions.shape[1]

    def kept(self, keep: Tensor) -> "Bucket":
        """The bucket after `keep [Bk, K]`."""
        whole = self.num_visual == self.images[0].num_visual  # an index is then its own place
        index = keep if whole else self.index.gather(1, keep)
        return replace(self, positions=self.positions.gather(1, keep), index=index)

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


def make_buckets(
    images: Sequence[Image], device: torch.device, *, by_text: bool, by_ends: bool
) -> list[Bucket]:
    """Group images by likeness, in order of appearance; what is masked is not in a bucket."""
    groups: dict[tuple[object, ...], list[Image]] = {}
    for image in images:
        if image.num_shown:
            key = image.likeness(by_text=by_text, by_ends=by_ends)
            groups.setdefault(key, []).append(image)
    buckets = []
    for group in groups.values():
        sample = torch.tensor([image.sample for image in group])
        positions = torch.stack([_shown(image, image.positions) for image in group])
        # one copy to the device for both
        both = sent(torch.cat([sample[:, None], positions], dim=1), device)
        sample, positions = both[:, 0], both[:, 1:]
        if group[0].shown is None:
            index = torch.arange(positions.shape[1], device=device).expand(positions.shape)
        else:
            places = [_shown(image, torch.arange(image.num_visual)) for image in group]
            index = sent(torch.stack(places), device)
        buckets.append(Bucket(group, sample, positions, index))
    return buckets


def _shown(image: Image, values: Tensor) -> Tensor:
    return values if image.shown is None else values[image.shown]


def numbered(images: Sequence[Image]) -> tuple[dict[Image, int], Counter[int]]:
    """Place of each image among those of its row, and how many each row has."""
    seen: Counter[int] = Counter()
    places = {}
    for image in images:
        places[image] = seen[image.sample]
        seen[image.sample] += 1
    return places, seen


class Located(NamedTuple):
    """An image of an encoder call, and its placeholders.

    Args:
        sample: Row of the batch.
        positions: `[N0]` int64 on the host.
        first: The first of them.
        last: The last of them.
        capture: The encoder call.
        number: Place in it.
    """

    sample: int
    positions: Tensor
    first: int
    last: int
    capture: "EncoderCapture"
    number: int


def locate_images(
    marks: Tensor, captures: Sequence["EncoderCapture"], codes: Mapping[Modality, int]
) -> list[Located]:
    """Give each captured image its placeholder positions, in the order of rows and positions.

    Args:
        marks: `[B, Q]` int64 on the host: 0 for text, else the modality's code.
        captures: One encoder call a modality.
        codes: Code of each modality in `marks`.

    Raises:
        CompressionStateError: Placeholders and features do not fit (a chunk cuts an image in two).
    """
    found = []
    for capture in captures:
        where = (marks == codes[capture.modality]).nonzero()
        start = 0
        for number in _expansion(where, capture, marks.shape[0]):
            end = start + capture.counts[number]
            if end > len(where):
                raise _mismatch(len(where), capture)
            (sample, first), (other, last) = where[[start, end - 1]].tolist()
            if sample != other:
                raise _mismatch(len(where), capture)
            positions = where[start:end, 1]
            found.append(Located(sample, positions, first, last, capture, number))
            start = end
        if start != len(where):
            raise _mismatch(len(where), capture)
    return sorted(found, key=lambda one: (one.sample, one.first))


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
        "compressed prefill must see whole images (generate's prefill_chunk_size sees to that; "
        "chunks made by hand do not)"
    )
