"""A report as HTML for notebooks: a small table, and kept tokens on their rasters or pictures."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from vispress.errors import ConfigError

if TYPE_CHECKING:
    from vispress.report import CompressionReport, ImageReport

_MOST = 16
"""Images that are drawn; the table has them all."""
_SIDE = 160
_LONGEST = 640
_DIMMED = 0.75


@dataclass(frozen=True)
class ReportPictures:
    """A report drawn over its pictures; a notebook shows it.

    Args:
        report: The report.
        pictures: One an image of the report, in order.
    """

    report: "CompressionReport"
    pictures: tuple[Any, ...]

    def _repr_html_(self) -> str:
        return as_html(self.report, [_uri(picture) for picture in self.pictures])


def over(report: "CompressionReport", pictures: Sequence[Any]) -> ReportPictures:
    """Put a report over its pictures.

    Args:
        report: The report.
        pictures: PIL images, in the order of the report's images over all samples.

    Raises:
        ConfigError: They are not as many as the report's images.
    """
    images = [image for sample in report.samples for image in sample.images]
    if len(pictures) != len(images):
        raise ConfigError(
            f"the report has {len(images)} images, got {len(pictures)} pictures; give one each, in "
            "the order of the prompts"
        )
    return ReportPictures(report, tuple(pictures))


def as_html(report: "CompressionReport", uris: Sequence[str] = ()) -> str:
    """Write a report as HTML.

    Args:
        report: The report.
        uris: Data URIs of its pictures, or none.
    """
    images = [
        (f"{b}.{i}", image)
        for b, sample in enumerate(report.samples)
        for i, image in enumerate(sample.images)
    ]
    rows = "".join(_row(name, image) for name, image in images)
    head = "".join(f'<th scope="col">{name}</th>' for name in ("image", "kept", "of", "placements"))
    shown = [
        _drawn(name, image, uris[number] if uris else None)
        for number, (name, image) in enumerate(images[:_MOST])
        if image.grid is not None
    ]
    lines = [escape(line) for line in str(report).splitlines()[len(images) :]]
    drawn = f'<div style="display:flex;flex-wrap:wrap;gap:8px">{"".join(shown)}</div>'
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"<p>{'<br>'.join(lines)}</p>{drawn if shown else ''}"
    )


def _row(name: str, image: "ImageReport") -> str:
    places = ", ".join(f"{p.method} before layer {p.layer}: {p.num_kept}" for p in image.placements)
    cells = (name, str(image.num_kept), str(image.num_visual), places)
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _drawn(name: str, image: "ImageReport", uri: str | None) -> str:
    """Draw an image, or a video's first frame: what is dropped lies under a dark square."""
    assert image.grid is not None
    _, rows, columns = image.grid
    kept = set(image.kept)
    dropped = "".join(
        f"M{place % columns} {place // columns}h1v1h-1z"
        for place in range(rows * columns)
        if place not in kept
    )
    high = round(_SIDE * rows / columns)
    behind = f'<rect width="{columns}" height="{rows}" fill="#9cf"/>'
    if uri is not None:
        behind = (
            f'<image href="{uri}" width="{columns}" height="{rows}" preserveAspectRatio="none"/>'
        )
    title = f"{escape(name)}: {image.num_kept} of {image.num_visual} tokens"
    return (
        f'<svg width="{_SIDE}" height="{high}" viewBox="0 0 {columns} {rows}" role="img" '
        f'aria-label="{title}">'
        f'{behind}<path d="{dropped}" fill="#111" fill-opacity="{_DIMMED}"/></svg>'
    )


def _uri(picture: Any) -> str:
    small = picture.convert("RGB")
    small.thumbnail((_LONGEST, _LONGEST))
    buffer = io.BytesIO()
    small.save(buffer, format="jpeg", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
