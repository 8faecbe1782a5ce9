"""Published cost figures as data, and shorthands for the counts behind them."""

from typing import NamedTuple

from vispress.flops import flops, kv_bytes, visual_per_layer
from vispress.methods.base import Compressor


class Shape(NamedTuple):
    """A language model: decoder layers, width, MLP width, key-value width."""

    layers: int
    width: int
    mlp: int
    kv: int


VICUNA_7B = Shape(32, 4096, 11008, 4096)
VICUNA_13B = Shape(40, 5120, 13824, 5120)
QWEN2_7B = Shape(28, 3584, 18944, 512)


class Cell(NamedTuple):
    """One printed figure.

    Args:
        source: Section, and whose table.
        what: Model and method.
        ours: What our counter gives.
        printed: What the table says, in the same unit.
        why: For cells that differ: what the specification says about it.
    """

    source: str
    what: str
    ours: float
    printed: float
    why: str = ""

    @property
    def off(self) -> float:
        """Relative difference."""
        return abs(self.ours / self.printed - 1)


def whole(tokens: int, shape: Shape = VICUNA_7B, text: int = 0) -> list[int]:
    """The same count in every layer."""
    return [tokens + text] * shape.layers


def left(
    method: Compressor, tokens: int, shape: Shape = VICUNA_7B, text: int = 0
) -> tuple[int, ...]:
    """Counts of a real method, from its placements."""
    counts = visual_per_layer(tokens, shape.layers, method.placements(shape.layers))
    return tuple(count + text for count in counts)


def spans(*parts: tuple[int, int]) -> list[int]:
    """Counts from `(tokens, layers)` pairs."""
    return [tokens for tokens, layers in parts for _ in range(layers)]


def tera(counts, convention: str = "mac3", shape: Shape = VICUNA_7B) -> float:
    """10^12 FLOPs, or multiply-adds."""
    return flops(counts, shape.width, shape.mlp, convention) / 1e12


def share(counts, full: int, convention: str = "mac3", shape: Shape = VICUNA_7B) -> float:
    """Per cent of the cost of `full` tokens in every layer."""
    return 100 * tera(counts, convention, shape) / tera(whole(full, shape), convention, shape)


def cache(counts, unit: int, shape: Shape = VICUNA_7B) -> float:
    """Keys and values in fp16, in `unit` bytes."""
    return kv_bytes(counts, shape.kv) / unit


MB, MIB, GB = 10**6, 2**20, 10**9
