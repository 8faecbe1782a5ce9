"""The cells of a plan: every method at every keep ratio, each with a name of its own."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal

from vispress.bench.plan.downsample import Downsample
from vispress.bench.plan.oracle import Oracle
from vispress.bench.plan.saved import COMPRESSOR, read_entry
from vispress.chain import Chain
from vispress.config import from_mapping, to_mapping
from vispress.errors import BudgetError, ConfigError
from vispress.methods.base import Compressor
from vispress.weights import SavedCompressor

BudgetMeaning = Literal["mean", "placement"]
Entry = str | Mapping[str, Any]
Made = Compressor | Downsample

UNCOMPRESSED: Final = "none"
BUDGETS: Final = ("keep_ratio", "num_tokens", "mean_keep_ratio")
_OWN: Final[dict[str, type[Made]]] = {"oracle": Oracle, "downsample": Downsample}
"""Controls that are the benchmark's own: they need its prompts or its pictures."""
BOUNDS: Final = ("no_image", "vtw")
"""Methods whose count is fixed: they stand beside those that are compared at a budget, VTW too,
which is a published one."""
_OWN_KEYS = ("label", "seeds", "keep_ratios")
_LABEL = re.compile(r"(?!.*--)[\w.+=][\w.+=-]*")


def is_control(method: Compressor | type[Compressor]) -> bool:
    """Tell whether a method is one that others are compared with."""
    return method.evidence == "control" or method.name in BOUNDS


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: a method (or chain) at one budget, over all tasks.

    Args:
        group: Method as the table calls it; seeds of a group are averaged there.
        chain: Compressors; none for the uncompressed model.
        picture: Smaller pictures, in place of a chain.
        keep_ratio: What the plan asked, None when the method brings its own budget.
        seed: Seed of a randomised method, when the plan lists several.
        optional: Whether a model or budget that it does not fit is noted in place of raised.
        refused: Why it cannot be run on any model, or None.
        saved: Parameters of the chain's method, where the plan named a folder.
    """

    group: str
    chain: tuple[Compressor, ...] = ()
    picture: Downsample | None = None
    keep_ratio: float | None = None
    seed: int | None = None
    optional: bool = False
    refused: str | None = None
    saved: SavedCompressor | None = None

    @property
    def key(self) -> str:
        """Unique in the plan; also the name of its file."""
        ratio = "" if self.keep_ratio is None else f"--{self.keep_ratio:g}"
        return f"{self.group}{ratio}" + ("" if self.seed is None else f"--seed{self.seed}")

    @property
    def control(self) -> bool:
        """Whether all of it are controls; False for the uncompressed model."""
        flags = [is_control(method) for method in self.chain]
        return self.picture is not None or (bool(flags) and all(flags))

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data, with every hyper-parameter."""
        methods = [to_mapping(method) for method in self.chain]
        if self.picture is not None:
            values = {f.name: getattr(self.picture, f.name) for f in fields(self.picture)}
            budgets = {name: value for name, value in values.items() if value is not None}
            methods = [{"method": self.picture.name, **budgets}]
        data = {
            "key": self.key,
            "group": self.group,
            "methods": methods,
            "control": self.control,
            "keep_ratio": self.keep_ratio,
            "seed": self.seed,
        }
        if self.saved is not None:  # results of other parameters are of another cell
            data[COMPRESSOR] = {key: self.saved.card.get(key) for key in ("sha256", "positions")}
        return data


def cells_of(
    entry: Entry, keep_ratios: tuple[float, ...], budget: BudgetMeaning, *, optional: bool = False
) -> list[Cell]:
    """Make the cells of one entry of a plan's `methods`.

    Args:
        entry: As `Plan.methods` says.
        keep_ratios: The plan's; they apply to an entry without a budget of its own.
        budget: What they mean.
        optional: Note a budget that the method refuses, in place of raising.

    Raises:
        ConfigError: The entry is malformed.
        UnsupportedMethodError: Unknown method.
        BudgetError: A keep ratio is out of range.
    """
    data = {"method": entry} if isinstance(entry, str) else entry
    if not isinstance(data, Mapping):
        raise ConfigError(f"a method must be a name or a mapping, got {entry!r}")
    rest = {str(key): value for key, value in data.items() if key not in _OWN_KEYS}
    label = data.get("label")
    if "chain" in rest:
        chain = from_mapping(rest, f"method {entry!r}")
        assert isinstance(chain, Chain)
        if {"seeds", "keep_ratios"} & set(data) or chain.mean_keep_ratio is not None:
            raise ConfigError(
                "a chain in a plan takes no seeds, keep_ratios or mean_keep_ratio; set them in its "
                "parts"
            )
        name = "+".join(method.name for method in chain)
        return [Cell(group=_label(label, name), chain=tuple(chain))]
    ratios = _list("keep_ratios", data.get("keep_ratios", keep_ratios))
    saved = None
    if COMPRESSOR in rest:
        rest, saved = read_entry(rest, f"method {entry!r}", budget=not ratios)
    made = _make(rest, f"method {entry!r}")
    field = "mean_keep_ratio" if budget == "mean" and isinstance(made, Compressor) else "keep_ratio"
    group = _label(label, made.name)
    cells = []
    for ratio in ratios if ratios and takes_ratio(made) else (None,):
        for seed in _list("seeds", data.get("seeds", ())) or (None,):
            asked = {} if ratio is None else {field: ratio}
            drawn = {} if seed is None else {"seed": seed}
            cell = Cell(group=group, keep_ratio=ratio, seed=seed, optional=optional, saved=saved)
            try:
                method = _make(rest | asked | drawn, f"method {entry!r}")
            except BudgetError as error:
                if not optional:
                    raise
                cells.append(replace(cell, refused=str(error)))
                continue
            if isinstance(method, Downsample):
                cells.append(replace(cell, picture=method))
            else:
                cells.append(replace(cell, chain=(method,)))
    return cells


def takes_ratio(method: Made) -> bool:
    """Tell whether a keep ratio can be set: there is no budget yet, and the method takes one."""
    if not method.takes_budget or any(getattr(method, name, None) is not None for name in BUDGETS):
        return False
    try:
        replace(method, keep_ratio=0.5)
    except (BudgetError, ConfigError):  # a threshold of its own decides
        return False
    return True


def _make(data: dict[str, Any], where: str) -> Made:
    """Make a registered method, or a control of the benchmark's own."""
    control = _OWN.get(str(data.get("method")))
    if control is None:
        made = from_mapping(data, where)
        assert isinstance(made, Compressor)
        return made
    values = {key: value for key, value in data.items() if key != "method"}
    valid = [field.name for field in fields(control) if field.name in BUDGETS]
    for key in values:
        if key not in valid:
            raise ConfigError(f"{control.name} has no key {key!r}; valid: {', '.join(valid)}")
    return control(**values)


def _label(asked: Any, default: str) -> str:
    label = default if asked is None else str(asked)
    if not _LABEL.fullmatch(label) or label == UNCOMPRESSED:
        raise ConfigError(
            f"a label has letters, digits and . + = - _ and is not {UNCOMPRESSED!r}: got {label!r}"
        )
    return label


def _list(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} must be a list, got {value!r}")
    return tuple(value)
