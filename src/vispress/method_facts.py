"""Everything there is to say about one method, from its class, its docstrings and its YAML."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Final

from vispress.budget import PUBLISHED_DEPTH
from vispress.doctor import Family
from vispress.errors import BudgetError, ConfigError
from vispress.listing import does, reads, where
from vispress.methods.base import Compressor
from vispress.registry import get_method
from vispress.types import CLS_SIGNALS
from vispress.yaml_files import shipped_files

_BUDGETS: Final = ("keep_ratio", "num_tokens", "mean_keep_ratio")
_ARGUMENT: Final = re.compile(r"^    (\w+): (.+(?:\n {8,}.+)*)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A hyper-parameter.

    Args:
        name: Of the field.
        default: Its default, as Python writes it.
        meaning: From the docstring.
    """

    name: str
    default: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class MethodFacts:
    """A method in words.

    Args:
        name: As registered.
        does: What becomes of tokens that are not kept.
        keeps: Which are.
        acts: Where.
        reads: What is shown to it.
        source: Citation.
        evidence: How far it is known to be what its authors run.
        about: What it follows and where it differs.
        settings: Its hyper-parameters, budgets last.
        published: The shipped configuration, as YAML; empty where there is none.
        works: By family: None, or why not.
    """

    name: str
    does: str
    keeps: str
    acts: str
    reads: str
    source: str
    evidence: str
    about: str
    settings: tuple[Setting, ...]
    published: str
    works: dict[str, str | None]


def facts_of(name: str, families: Sequence[Family]) -> MethodFacts:
    """Gather what is known of a method.

    Raises:
        UnsupportedMethodError: There is none of that name.
    """
    cls = get_method(name)
    path = shipped_files("methods").get(name)
    own = [field for field in fields(cls) if field.name not in _BUDGETS]
    budgets = [field for field in fields(cls) if field.name in _BUDGETS and cls.takes_budget]
    meanings = _meanings(cls)
    return MethodFacts(
        name=name,
        does=does(cls),
        keeps=cls.summary,
        acts=where(cls),
        reads=reads(cls) or "features",
        source=cls.paper,
        evidence=cls.evidence,
        about=inspect.cleandoc(inspect.getmodule(cls).__doc__ or ""),
        settings=tuple(_setting(field, meanings) for field in own + budgets),
        published="" if path is None else path.read_text(encoding="utf-8").strip(),
        works={family.name: family_gap(cls, family) for family in families},
    )


def family_gap(cls: type[Compressor], family: Family) -> str | None:
    """Say why a method does not work on a family, whatever the checkpoint; None where it may."""
    if cls.needs is not None and cls.needs not in family.kinds:
        return f"made for {cls.needs} input"
    if family.attention_every > 1 and (gap := _linear_gap(cls, family.attention_every)) is not None:
        return gap
    if not cls.reads & CLS_SIGNALS or family.has_cls is not False:
        return None
    if any(field.name == "scores" for field in fields(cls)):
        return "its encoder has no [CLS] token; scores='column_mean' is the substitute"
    return "its encoder has no [CLS] token"


def _linear_gap(cls: type[Compressor], every: int) -> str | None:
    """Say what a method reads of layers with linear attention, at its published layers."""
    from vispress.runtime.forward.attention_reads import attention_layers

    for ratio in (None, 0.5):
        try:
            method = cls(keep_ratio=ratio)
            placements = method.placements(PUBLISHED_DEPTH)
            break
        except (BudgetError, ConfigError):
            continue
    else:
        return None
    parts = (
        method.pair_masker(),
        method.cache_evictor(),
        method.gist_evictor(),
        method.cached_selector(),
        method.compute_pruner(),
    )
    kind = "linear attention in most layers"
    if method.gates or method.softens == "keys" or any(part is not None for part in parts):
        return f"{kind}: a state, and no attention weights, keys or values to mask or evict"
    for place in placements:
        for layer in sorted({*place.transitions, *attention_layers(place)}):
            if (layer + 1) % every:
                return (
                    f"{kind}, layer {layer} among them, whose attention it reads at its published "
                    f"setting; layers {every - 1}, {2 * every - 1} and so on have attention weights"
                )
    return None


def _setting(field: "Field[Any]", meanings: dict[str, str]) -> Setting:
    default = "required"
    if field.default is not MISSING:
        default = repr(field.default)
    elif field.default_factory is not MISSING:
        default = repr(field.default_factory())
    return Setting(name=field.name, default=default, meaning=meanings.get(field.name, ""))


def _meanings(cls: type[Compressor]) -> dict[str, str]:
    """What docstrings say of fields; a class's own words stand before those of its bases."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        text = inspect.cleandoc(one.__doc__ or "")
        _, _, arguments = text.partition("\nArgs:\n")
        arguments = arguments.partition("\n\n")[0]
        found |= {name: " ".join(said.split()) for name, said in _ARGUMENT.findall(arguments)}
    return found
