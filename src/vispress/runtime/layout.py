"""State what a prompt is: documents, prompt ends, images, validity. On the host, hashable.

A batch row holds one document, or several behind each other (packed). What ranks an image is a
*prompt*: its document up to the row where an answer begins. Everything here follows from token ids,
masks, labels and sizes alone, never from values that a model computes; so equal layouts are handled
by equal steps, and a layout can be a key.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from vispress.adapters.base import Modality
from vispress.errors import ConfigError

T = TypeVar("T")
Runs = tuple[tuple[int, int], ...]
"""Half-open ranges of positions, ascending."""


@dataclass(frozen=True)
class Document:
    """One sample: logical positions `[start, stop)` of a row of the chunk, padding included."""

    row: int
    start: int
    stop: int

    def places(self, valid: Tensor | None) -> Tensor:
        """`[T]` int64, its positions that are no padding.

        Args:
            valid: `[B, Q]` bool, or None for no padding.
        """
        if valid is None:
            return torch.arange(self.start, self.stop)
        return valid[self.row, self.start : self.stop].nonzero()[:, 0] + self.start

    def last(self, valid: Tensor | None) -> int | None:
        """Its last position that is no padding; None when all is."""
        if valid is None:
            return self.stop - 1
        places = self.places(valid)
        return int(places[-1]) if len(places) else None


@dataclass(frozen=True)
class Prompt:
    """What decides about some images of a document: its tokens before an answer.

    Args:
        document: Number of the document.
        row: Its row.
        start: First position of the document.
        stop: Position behind the prompt's last token.
        ends: Rows that stand for the end of a prompt, this one's first: one, or those before all
            later supervised runs too (see `Queries.ENDS`). Empty: nothing asks about its images.
    """

    document: int
    row: int
    start: int
    stop: int
    ends: tuple[int, ...]


@dataclass(frozen=True)
class ImageLayout:
    """Where one image or video stands.

    Args:
        modality: Image or video.
        number: Place in what the encoder gave.
        row: Row of the batch.
        prompt: Number of the prompt that decides about it.
        runs: Its positions.
        dead: Places among its tokens that are masked; they never enter the LLM's attention.
    """

    modality: Modality
    number: int
    row: int
    prompt: int
    runs: Runs
    dead: Runs = ()


@dataclass(frozen=True)
class PromptLayout:
    """The prompt of one call.

    Args:
        batch: Rows (B).
        length: Positions of the chunk (Q).
        documents: In order of rows and positions.
        prompts: Those that decide about images, in order.
        images: In order of rows and positions.
        hidden: Of each row, positions that are padding, or answers that must not decide.
    """

    batch: int
    length: int
    documents: tuple[Document, ...]
    prompts: tuple[Prompt, ...]
    images: tuple[ImageLayout, ...]
    hidden: tuple[Runs, ...]

    @property
    def packed(self) -> bool:
        """Whether a row holds several documents."""
        return len(self.documents) > self.batch

    @cached_property
    def document_of(self) -> Tensor:
        """`[B, Q]` int64, number of the document at each position."""
        numbers = torch.zeros(self.batch, self.length, dtype=torch.long)
        for number, document in enumerate(self.documents):
            numbers[document.row, document.start : document.stop] = number
        return numbers


def runs_of(mask: Tensor) -> Runs:
    """Ranges of the True places of `[Q]` bool."""
    edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def runs_of_positions(positions: Tensor, first: int, last: int) -> Runs:
    """Ranges of ascending positions `[N]`, of which the first and the last are known."""
    if last - first + 1 == len(positions):
        return ((first, last + 1),)
    breaks = (positions.diff() != 1).nonzero()[:, 0].tolist()
    starts = [first, *(int(positions[i + 1]) for i in breaks)]
    stops = [*(int(positions[i]) + 1 for i in breaks), last + 1]
    return tuple(zip(starts, stops, strict=True))


def whole_rows(batch: int, length: int) -> tuple[Document, ...]:
    """One document a row."""
    return tuple(Document(row, 0, length) for row in range(batch))


def split_documents(breaks: Tensor) -> tuple[Document, ...]:
    """Documents of `[B, Q]` bool, True where a token is not of the document of the one before."""
    found = []
    for row, marks in enumerate(breaks):
        starts = [0, *(place for place in marks.nonzero()[:, 0].tolist() if place)]
        ends = [*starts[1:], len(marks)]
        found += [Document(row, a, b) for a, b in zip(starts, ends, strict=True)]
    return tuple(found)


@dataclass(frozen=True, eq=False)
class PromptEnds:
    """Where prompts end, as the caller said.

    Args:
        supervised: `[B, Q]` bool, tokens that a loss is taken on; None without labels.
        lengths: Tokens of each document's prompt in this chunk; None where nothing was said.
    """

    supervised: Tensor | None = None
    lengths: Sequence[int] | None = None

    def of(self, number: int, document: Document, valid: Tensor | None) -> tuple[int, ...] | None:
        """Rows before each answer of a document, ascending; None: its last token asks.

        Args:
            number: Of the document.
            document: The document.
            valid: `[B, Q]` bool, no padding; None for no padding at all.
        """
        if self.lengths is None and self.supervised is None:
            return None
        places = document.places(valid)
        if self.lengths is not None:
            count = min(self.lengths[number], len(places))
            return (int(places[count - 1]),) if count > 0 else ()
        assert self.supervised is not None
        taught = self.supervised[document.row][places]
        starts = taught[1:] & ~taught[:-1]
        return tuple(places[:-1][starts].tolist())


def find_prompts(
    documents: Sequence[Document],
    lasts: Sequence[tuple[int, int]],
    valid: Tensor | None,
    ends: PromptEnds,
) -> tuple[tuple[Prompt, ...], list[int]]:
    """Find the prompts that decide about images, and the number of each image's.

    Args:
        documents: Of the chunk.
        lasts: Document and last position of each image.
        valid: `[B, Q]` bool, no padding; None for no padding at all.
        ends: Where prompts end.
    """
    asked: dict[int, tuple[int, ...] | None] = {}
    prompts: dict[Prompt, int] = {}
    numbers = []
    for number, last in lasts:
        document = documents[number]
        if number not in asked:
            asked[number] = ends.of(number, document, valid)
        rows, stop = asked[number], document.stop
        if rows is None:
            end = document.last(valid)
            rows = () if end is None else (end,)
        else:
            rows = tuple(row for row in rows if row >= last)
            stop = rows[0] + 1 if rows else document.start
        prompt = Prompt(number, document.row, document.start, stop, rows)
        numbers.append(prompts.setdefault(prompt, len(prompts)))
    return tuple(prompts), numbers


def check_lengths(lengths: Sequence[int], documents: Sequence[Document]) -> None:
    """Refuse prompt lengths that are not one a document.

    Raises:
        ConfigError: Says how many are expected.
    """
    if len(lengths) != len(documents):
        raise ConfigError(
            f"prompt_lengths has {len(lengths)} entries for {len(documents)} documents; give one "
            "a document: of an unpacked batch, one a row"
        )


def check_sizes(
    lengths: Sequence[int], documents: Sequence[Document], valid: Tensor | None
) -> None:
    """Refuse a prompt that ends behind its document.

    Args:
        lengths: One a document, in tokens without padding.
        documents: Whole ones.
        valid: `[B, Q]` bool, no padding; None for no padding at all.

    Raises:
        ConfigError: Names the document.
    """
    for number, (length, document) in enumerate(zip(lengths, documents, strict=True)):
        if length > (most := len(document.places(valid))):
            raise ConfigError(
                f"prompt_lengths[{number}] is {length}, but document {number} has {most} tokens; "
                "count each document's own, without padding, one for each visual token"
            )


class Bounded(Generic[T]):
    """A mapping, by layouts, that forgets what was used longest ago; threads may share it.

    Args:
        size: Entries that are kept.
    """

    def __init__(self, size: int) -> None:
        self._size, self._lock = size, Lock()
        self._held: OrderedDict[Hashable, T] = OrderedDict()

    def __reduce__(self) -> Any:
        return type(self), (self._size,)  # a copy of a model begins its own

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable) -> T | None:
        """Give what is held under a key."""
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
            return found

    def put(self, key: Hashable, value: T) -> None:
        """Hold a value under a key."""
        with self._lock:
            self._held[key] = value
            self._held.move_to_end(key)
            while len(self._held) > self._size:
                self._held.popitem(last=False)
