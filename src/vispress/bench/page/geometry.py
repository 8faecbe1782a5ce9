"""Scales, ticks and label places of the plots, in pixels. The template only draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Values to pixels.

    Args:
        low: Value at `start`; above 0 where `log` is set.
        high: Value at `end`.
        start: Pixel of `low`.
        end: Pixel of `high`.
        log: Logarithmic; a value of 0 is drawn at `start`.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Find the pixel of a value, kept within the scale."""
        value = min(max(value, self.low), self.high)
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Choose round values in `[low, high]`: multiples of 1, 2, 2.5 or 5 times a power of ten.

    Args:
        low: Smaller end.
        high: Larger end.
        most: No more ticks than this, at least 2.
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + i) * step, 10) for i in range(count)]


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart: at least `gap` between neighbours, as near to their places as possible.

    Args:
        places: Where labels belong.
        gap: Distance between two labels; made smaller where they do not fit.
        low: No label above this.
        high: No label below this.

    Returns:
        Places in the order given; the order along the axis stays.
    """
    if not places:
        return []
    order = sorted(range(len(places)), key=lambda i: (places[i], i))
    gap = min(gap, (high - low) / max(1, len(places) - 1))
    # without the gaps the order must not fall: pooling neighbours is the least-squares answer
    blocks: list[list[float]] = []
    for rank, index in enumerate(order):
        blocks.append([places[index] - rank * gap, 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (mean, size), (last, many) = blocks[-2], blocks[-1]
            blocks[-2:] = [[(mean * size + last * many) / (size + many), size + many]]
    flat = [mean for mean, size in blocks for _ in range(int(size))]
    room = high - gap * (len(places) - 1)
    out = [0.0] * len(places)
    for rank, index in enumerate(order):
        out[index] = min(max(flat[rank], low), room) + rank * gap
    return out


def path(points: Sequence[tuple[float, float]]) -> str:
    """Write a polyline as SVG path data, in tenths of pixels."""
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points) if points else ""


def number(value: float) -> str:
    """Write a pixel with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


MARKERS = (
    "M-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0 -8.4 0Z",  # circle
    "M-3.8 -3.8h7.6v7.6h-7.6Z",  # square
    "M0 -4.9L4.6 3.4H-4.6Z",  # triangle
    "M0 -5.2L4.6 0L0 5.2L-4.6 0Z",  # diamond
    "M0 4.9L4.6 -3.4H-4.6Z",  # triangle, point down
    "M-1.5 -4.6h3v3.1h3.1v3h-3.1v3.1h-3v-3.1h-3.1v-3h3.1Z",  # cross
)
"""Shapes beside colours, about 9 pixels wide: a reader need not tell colours apart."""
