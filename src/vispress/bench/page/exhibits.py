"""Questions with their pictures, what each method kept of them, and what the model then said."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vispress.analysis.overlay import brightness, seen_picture
from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.page.questions import Pick
from vispress.bench.page.words import name_of
from vispress.bench.plan.oracle import evidence_tokens
from vispress.bench.tasks.task import EVIDENCE_GRID, Prompt
from vispress.report import ImageReport

_LONGEST = 256  # pixels of a stored picture
_LOSSLESS = 128


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture, stored once on the page.

    Args:
        key: Its id.
        uri: Data URI.
        aspect: Width over height.
        evidence: Outline of the cells that hold the answer, path data on a raster of 1 x 1.
    """

    key: str
    uri: str
    aspect: float
    evidence: str


@dataclass(frozen=True, kw_only=True)
class Shot:
    """Tokens kept of one picture.

    Args:
        columns: Of the raster of visual tokens.
        rows: Of it.
        shades: Opacity, and path data of the tokens that are dimmed by it.
        kept: Tokens at the last layer.
        total: Tokens it had.
        needed: Tokens over the evidence that are kept, of how many; None where unknown.
    """

    columns: int
    rows: int
    shades: tuple[tuple[str, str], ...]
    kept: int
    total: int
    needed: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class View:
    """One method's answer, and a shot of every picture where the model was run again."""

    name: str
    kind: str
    answer: str
    right: bool
    shots: tuple[Shot, ...] = ()

    @property
    def kept(self) -> str:
        """The share of all pictures that was kept, in words."""
        if not self.shots:
            return ""
        kept, total = (sum(getattr(s, name) for s in self.shots) for name in ("kept", "total"))
        return f"{kept} of {total}"

    @property
    def needed(self) -> str:
        """The share of the evidence that is left, in words."""
        known = [shot.needed for shot in self.shots if shot.needed is not None]
        if not known or not (total := sum(of for _, of in known)):
            return ""
        return f"{sum(left for left, _ in known)} of {total}"


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """A question as the page shows it."""

    pick: Pick
    question: str
    turns: tuple[str, ...]
    truth: str
    pictures: tuple[Picture, ...]
    views: tuple[View, ...]

    @property
    def whole(self) -> View | None:
        """The uncompressed model's answer, shown under the pictures."""
        return next((view for view in self.views if view.kind == "none"), None)

    @property
    def others(self) -> tuple[View, ...]:
        """Answers without a shot: of no image, and of all methods where the model is not here."""
        return tuple(v for v in self.views if not v.shots and v is not self.whole)


def make_picture(key: str, pixels: NDArray[np.float64], evidence: Sequence[int]) -> Picture:
    """Store a picture; large ones are made smaller.

    Args:
        key: Its id on the page.
        pixels: `[H, W, 3]` in `[0, 1]`.
        evidence: Cells of the evidence raster.
    """
    image = Image.fromarray(np.round(pixels * 255).astype(np.uint8))
    aspect = image.width / image.height
    image.thumbnail((_LONGEST, _LONGEST))
    small = max(image.size) <= _LOSSLESS
    kind, options = ("png", {"optimize": True}) if small else ("jpeg", {"quality": 82})
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(key=key, uri=uri, aspect=aspect, evidence=outline(evidence, EVIDENCE_GRID))


def pictures_of(prompt: Prompt, key: str, loaded: LoadedModel | None) -> tuple[Picture, ...]:
    """Make all pictures of a question, as the model sees them where it is at hand.

    Of a video, every other frame, as it is.
    """
    pictures = []
    for number, image in enumerate(prompt.images):
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
        if loaded is not None:
            pixels = seen_picture(loaded, prompt, number)
        evidence = prompt.evidence[number] if prompt.evidence else ()
        pictures.append(make_picture(f"{key}-{number}", pixels, evidence))
    cells = EVIDENCE_GRID**2
    for number, frames in enumerate(prompt.videos, start=len(prompt.images)):
        evidence = prompt.evidence[number] if prompt.evidence else ()
        for frame in range(0, len(frames), 2):
            in_frames = [cell % cells for cell in evidence if cell // cells in (frame, frame + 1)]
            pictures.append(make_picture(f"{key}-{number}-{frame}", frames[frame] / 255, in_frames))
    return tuple(pictures)


def shot_of(image: ImageReport, evidence: Sequence[int]) -> Shot | None:
    """Take one picture's tokens from a report; None for pictures composed of crops."""
    if image.grid is None:
        return None
    light = brightness(image)
    rows, columns = (int(side) for side in light.shape)
    dims = {f"{1 - level:.2f}": np.argwhere(light == level) for level in np.unique(light)}
    shades = tuple(
        (opacity, runs(map(tuple, cells))) for opacity, cells in dims.items() if float(opacity) > 0
    )
    needed = evidence_tokens(evidence, (1, rows, columns))
    left = int(needed[list(image.kept)].sum())
    return Shot(
        columns=columns,
        rows=rows,
        shades=shades,
        kept=image.num_kept,
        total=image.num_visual,
        needed=(left, int(needed.sum())) if evidence else None,
    )


def runs(cells: Iterable[tuple[int, ...]]) -> str:
    """Draw cells (row, column) as path data, neighbours in a row together."""
    spans: list[list[int]] = []
    for row, column in sorted(cells):
        if spans and spans[-1][0] == row and spans[-1][1] + spans[-1][2] == column:
            spans[-1][2] += 1
        else:
            spans.append([row, column, 1])
    return "".join(f"M{column} {row}h{count}v1h-{count}z" for row, column, count in spans)


def outline(cells: Sequence[int], side: int) -> str:
    """Draw the border of a set of cells of a `side` x `side` raster, as path data on it."""
    inside = {divmod(cell, side) for cell in cells}
    edges = []
    for r, c in sorted(inside):
        edges += [f"M{c} {r}h1"] * ((r - 1, c) not in inside)
        edges += [f"M{c} {r + 1}h1"] * ((r + 1, c) not in inside)
        edges += [f"M{c} {r}v1"] * ((r, c - 1) not in inside)
        edges += [f"M{c + 1} {r}v1"] * ((r, c + 1) not in inside)
    return "".join(edges)


def exhibit(
    pick: Pick,
    prompt: Prompt,
    cells: Sequence[Mapping[str, Any]],
    kinds: Mapping[str, str],
    shots: Mapping[tuple[str, str, int], tuple[Shot, ...]],
    loaded: LoadedModel | None,
) -> Exhibit:
    """Put a question together.

    Args:
        pick: Which one.
        prompt: As drawn.
        cells: Whose answers are shown, the uncompressed model's first.
        kinds: How each group is drawn.
        shots: By cell, task and question.
        loaded: The model, where it is at hand.
    """
    views = []
    for cell in cells:
        stored, group = cell["tasks"][pick.task], cell["cell"]["group"]
        views.append(
            View(
                name=name_of(group),
                kind=kinds[group],
                answer=stored["answers"][pick.index],
                right=stored["right"][pick.index] == "1",
                shots=shots.get((cell["key"], pick.task, pick.index), ()),
            )
        )
    return Exhibit(
        pick=pick,
        question=words(prompt.text),
        turns=tuple(words(text) for text, _ in prompt.followups),
        truth=prompt.answer_text,
        pictures=pictures_of(prompt, f"{pick.task}-{pick.index}", loaded),
        views=tuple(views),
    )


def words(text: str) -> str:
    """Write a prompt as a reader would say it: without its mark for the answer."""
    text = text.strip().removesuffix(":").strip().replace(" ?", "?")
    return text.removeprefix("<image>").strip() if text.count("<image>") == 1 else text
