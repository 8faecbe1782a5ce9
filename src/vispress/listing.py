"""What a method does, where and by what: in words, from its class."""

from collections.abc import Sequence
from typing import Final

from vispress.budget import PUBLISHED_DEPTH
from vispress.errors import BudgetError, ConfigError
from vispress.methods.base import Compressor
from vispress.methods.cache_evictor import CacheEvictor
from vispress.methods.gist_evictor import GistEvictor
from vispress.methods.pair_masker import PairMasker
from vispress.registry import get_method, list_methods
from vispress.types import Placement, Stage

PLACES: Final = (
    ("in the encoder", ("in the encoder",)),
    ("before the LLM", ("before the LLM",)),
    ("in the LLM", ("before layer", "around", "in layers", "as configured")),
    ("in attention and the KV cache", ("in attention", "in the KV cache")),
)
"""Headings, and how what stands under them begins to say where it acts."""

_DEPTH = PUBLISHED_DEPTH


def family_markdown() -> str:
    """Write the README's table: one row a family, names linked to their sources."""
    rows: dict[str, list[str]] = {}
    for name in list_methods():
        cls = get_method(name)
        module = cls.__module__.rpartition(".")[2]
        link = f"[`{name}`](src/vispress/methods/{module}.py)"
        rows.setdefault(_family(cls), []).append(link)
    order = [*(heading for heading, _ in PLACES), *_KINDS.values()]
    lines = ["| acts | methods |", "|---|---|"]
    return "\n".join([*lines, *(f"| {kind} | {', '.join(rows[kind])} |" for kind in order)])


_KINDS: Final = {
    "anyres": "on AnyRes crops",
    "video": "on videos",
    "trained": "with trained parameters",
    "composition": "compositions",
    "control": "controls",
}


def _family(cls: type[Compressor]) -> str:
    """Where a method stands in the README: by what it is made for, or by where it acts."""
    kind = cls.needs or ("trained" if cls.trained else cls.evidence)
    if kind in _KINDS:
        return _KINDS[kind]
    acts = where(cls)
    return next(heading for heading, beginnings in PLACES if acts.startswith(beginnings))


def method_markdown() -> str:
    """Write a table for the docs: one row a method, from the registry."""
    names = ("method", "", "keeps", "acts", "reads", "source", "evidence")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name in list_methods():
        cls = get_method(name)
        seen = reads(cls) or "features"
        cells = (f"`{name}`", does(cls), cls.summary, where(cls), seen, cls.paper, cls.evidence)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def reads(cls: type[Compressor]) -> str:
    """What a method is shown beside the features; masks and evictions are decided without these."""
    if issubclass(cls, GistEvictor):
        return "where its tokens stand"
    if issubclass(cls, PairMasker | CacheEvictor):
        return "attention of the layers it acts in"
    return ", ".join(sorted(signal.value for signal in cls.reads))


def does(cls: type[Compressor]) -> str:
    """What becomes of the tokens that are not kept."""
    if issubclass(cls, PairMasker):
        return "masks"
    if issubclass(cls, CacheEvictor | GistEvictor):
        return "evicts"
    return "merges" if cls.merges else "prunes"


def where(cls: type[Compressor]) -> str:
    """Stage and published layers, from the placements in a 32-layer LLM."""
    for ratio in (None, 0.5):
        try:
            method = cls(keep_ratio=ratio)
            placements = method.placements(_DEPTH)
        except (BudgetError, ConfigError):
            continue
        selector = method.cached_selector()
        decode = None if selector is None else selector.decode_placement(_DEPTH)
        found = _prefill(placements)
        if decode is None:
            return found
        return f"{found}; while decoding, from layer {decode.layer} of {_DEPTH}"
    return "as configured"


def _prefill(placements: Sequence[Placement]) -> str:
    first = placements[0]
    if first.stage is Stage.ENCODER:
        return "in the encoder"
    if first.stage is Stage.MASK:
        return f"in attention, from layer {first.layer} of {_DEPTH}"
    if first.stage is Stage.CACHE:
        return f"in the KV cache, behind the prefill, from layer {first.layer}"
    if first.probe is not None:
        ran = f"layers 0 to {first.probe}" if first.probe else "layer 0"
        return f"before the LLM, after a probe of {ran}"
    parts = []
    if len(placements) > 1 and all(p.until == p.layer + 1 for p in placements):
        return f"around each of layers {_numbers([p.layer for p in placements])} of {_DEPTH}"
    if first.until is not None:
        parts.append(f"around layers {first.layer} to {first.until - 1}")
    elif first.stage is Stage.COMPUTE:
        parts.append(f"in layers from {first.layer} on")
    elif first.layer == 0:
        parts.append("before the LLM")
    if layers := [placement.layer for placement in placements[len(parts) :]]:
        parts.append(f"before layer {_numbers(layers)} of {_DEPTH}")
    return "; ".join(parts)


def _numbers(layers: Sequence[int]) -> str:
    """Layers in words; those that follow each other as a range."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
