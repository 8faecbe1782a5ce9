"""A table for terminals of any width: columns that do not fit go on below, and nothing is cut."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from textwrap import wrap

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_AROUND = 3
"""Places that a column takes beside its cells."""


@dataclass
class Sheet:
    """A table whose first column names its rows and stands before every part of it.

    Args:
        title: Above it.
        caption: Below it.
        columns: Headings; all but the first and those of `words` are of numbers.
        words: Headings of columns with words.
    """

    title: str
    caption: str
    columns: Sequence[str]
    words: Sequence[str] = ()
    _rows: list[tuple[list[Text], str]] = field(default_factory=list)
    _sections: set[int] = field(default_factory=set)

    def add_row(self, *cells: str | Text, style: str = "") -> None:
        """Add a row; a cell may have several lines."""
        whole = [cell if isinstance(cell, Text) else Text(cell) for cell in cells]
        assert len(whole) == len(self.columns)
        self._rows.append((whole, style))

    def add_section(self) -> None:
        """Draw a line below the last row."""
        self._sections.add(len(self._rows) - 1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = list(self._parts(options.max_width))
        for number, places in enumerate(parts):
            title = self.title if number == 0 else f"{self.title}, continued"
            caption = self.caption if number == len(parts) - 1 else None
            yield self._table(places, title, caption)

    def _widths(self) -> list[int]:
        """The longest line of each column; of a heading, which wraps, the longest word."""
        found = [max(map(len, heading.split() or [""])) for heading in self.columns]
        for cells, _ in self._rows:
            lines = [[line.cell_len for line in cell.split("\n")] for cell in cells]
            found = [max(width, *lengths) for width, lengths in zip(found, lines, strict=True)]
        return found

    def _parts(self, room: int) -> Iterator[list[int]]:
        """Places of the columns that fit beside the first; at least one, however wide."""
        widths = [width + _AROUND for width in self._widths()]
        left = list(range(1, len(widths)))
        while left:
            part, used = [0], widths[0]
            while left and (len(part) == 1 or used + widths[left[0]] <= room):
                used += widths[left[0]]
                part.append(left.pop(0))
            yield part

    def _table(self, places: Sequence[int], title: str, caption: str | None) -> Table:
        table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
        widths = self._widths()
        for place in places:
            name = self.columns[place]
            heading = "\n".join(wrap(name, widths[place]))
            left = place == 0 or name in self.words
            table.add_column(heading, no_wrap=True, justify="left" if left else "right")
        for number, (cells, style) in enumerate(self._rows):
            end = number in self._sections
            table.add_row(*[cells[place] for place in places], style=style, end_section=end)
        return table
