"""What the command line prints about methods, and how it reads them from options."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from rich.markup import escape
from rich.table import Table

from vispress.bench.plan.cells import BUDGETS, takes_ratio
from vispress.budget import PUBLISHED_DEPTH
from vispress.config import make_compressor
from vispress.doctor import Family
from vispress.errors import BudgetError, ConfigError
from vispress.methods.base import Compressor
from vispress.methods.cache_evictor import CacheEvictor
from vispress.methods.encoder_pooler import EncoderPooler
from vispress.methods.gist_evictor import GistEvictor
from vispress.methods.pair_masker import PairMasker
from vispress.registry import get_method, list_methods
from vispress.types import CLS_SIGNALS, Placement, Stage
from vispress.yaml_files import parse_yaml

_DEPTH = PUBLISHED_DEPTH


def method_table(families: Sequence[Family]) -> Table:
    """Methods that work on at least one of the families: what they do, read and come from."""
    table = Table(caption=_legend(families), caption_justify="left")
    for name in ("method", "does", "where", "reads", "evidence", "paper", "models"):
        table.add_column(name, no_wrap=name in ("method", "evidence"), overflow="fold")
    for name in list_methods():
        cls = get_method(name)
        works = _works(cls, families)
        if works is not None:
            table.add_row(
                name,
                escape(f"{_does(cls)}; keeps {cls.summary}"),
                _where(cls),
                _reads(cls) or "features only",
                cls.evidence,
                cls.paper,
                works,
                end_section=True,
            )
    return table


def method_markdown() -> str:
    """The README's table: one row a method, from the registry."""
    names = ("method", "", "keeps", "acts", "reads", "source", "evidence")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name in list_methods():
        cls = get_method(name)
        reads = _reads(cls) or "features"
        cells = (f"`{name}`", _does(cls), cls.summary, _where(cls), reads, cls.paper, cls.evidence)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _legend(families: Sequence[Family]) -> str:
    words = {True: "[CLS]", False: "no [CLS]", None: "[CLS] if its encoder has one"}
    # brackets are markup to rich
    listed = "; ".join(f"{f.name} ({words[f.has_cls]})" for f in families)
    return escape(f"families: {listed}")


def _works(cls: type[Compressor], families: Sequence[Family]) -> str | None:
    """Where a method works; None for nowhere among these families."""
    if cls.needs is not None:
        fitting = [family for family in families if cls.needs in family.kinds]
        if not fitting:
            return None
        if len(fitting) < len(families):
            return f"with {cls.needs} input: {', '.join(family.name for family in fitting)}"
    if issubclass(cls, EncoderPooler):
        return "where the encoder sees whole rasters"
    if not cls.reads & CLS_SIGNALS or all(family.has_cls for family in families):
        return "all"
    if any(field.name == "scores" for field in fields(cls)):
        return escape("with [CLS]; others need scores='column_mean'")
    none = all(family.has_cls is False for family in families)
    return None if none else escape("with [CLS] only")


def _reads(cls: type[Compressor]) -> str:
    """What a method is shown beside the features; masks and evictions are decided without these."""
    if issubclass(cls, GistEvictor):
        return "where its tokens stand"
    if issubclass(cls, PairMasker | CacheEvictor):
        return "attention of the layers it acts in"
    return ", ".join(sorted(signal.value for signal in cls.reads))


def _does(cls: type[Compressor]) -> str:
    """What becomes of the tokens that are not kept."""
    if issubclass(cls, PairMasker):
        return "masks"
    if issubclass(cls, CacheEvictor | GistEvictor):
        return "evicts"
    return "merges" if cls.merges else "prunes"


def _where(cls: type[Compressor]) -> str:
    """Stage and published layers, from the placements in a 32-layer LLM."""
    for ratio in (None, 0.5):
        try:
            method = cls(keep_ratio=ratio)
            placements = method.placements(_DEPTH)
        except (BudgetError, ConfigError):
            continue
        selector = method.cached_selector()
        decode = None if selector is None else selector.decode_placement(_DEPTH)
        where = _prefill(placements)
        if decode is None:
            return where
        return f"{where}; while decoding, from layer {decode.layer} of {_DEPTH}"
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


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` pairs, values read as YAML.

    Raises:
        ConfigError: A pair has no `=`, or its value is not YAML.
    """
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set needs KEY=VALUE, got {pair!r}")
        values[key] = parse_yaml(text, f"--set {pair!r}")
    return values


def make_all(names: Sequence[str], values: dict[str, Any]) -> list[Compressor]:
    """Compressors of those names, each with the options that it knows.

    A method that takes no budget (`no_image`) is given none.

    Raises:
        UnsupportedMethodError: Unknown method.
        ConfigError: No method knows an option.
        BudgetError: A budget is out of range.
    """
    known = {name: {field.name for field in fields(get_method(name))} for name in names}
    for key in values:
        if not any(key in own for own in known.values()):
            # with one name, make_compressor says which options are valid
            make_compressor(names[0], **{key: values[key]})
    made = []
    for name in names:
        own = {key: value for key, value in values.items() if key in known[name]}
        made.append(_make(name, own))
    return made


def make_budgeted(name: str, values: dict[str, Any], ratio: float) -> Compressor:
    """A compressor that keeps a share of tokens where it has no schedule and is given no budget.

    Args:
        name: Of the method.
        values: Its options.
        ratio: The share.

    Raises:
        UnsupportedMethodError: Unknown method.
        ConfigError: The method does not know an option.
        BudgetError: A budget is out of range.
    """
    (made,) = make_all([name], values)
    try:
        made.placements(PUBLISHED_DEPTH)
    except BudgetError:
        if made.given_budget():
            raise
        (made,) = make_all([name], values | {"keep_ratio": ratio})
    return made


def _make(name: str, values: dict[str, Any]) -> Compressor:
    rest = {key: value for key, value in values.items() if key not in BUDGETS}
    bare = make_compressor(name, **rest)
    return make_compressor(name, **values) if takes_ratio(bare) else bare
