"""The cells of a plan: every method at every keep ratio, each with a name of its own."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from vispress.config import from_mapping, make_compressor, to_mapping
from vispress.errors import BudgetError, ConfigError
from vispress.methods.base import Compressor

BudgetMeaning = Literal["mean", "placement"]
Entry = str | Mapping[str, Any]

UNCOMPRESSED = "none"
BUDGETS = ("keep_ratio", "num_tokens", "mean_keep_ratio")
_OWN_KEYS = ("label", "seeds", "keep_ratios")
_LABEL = re.compile(r"(?!.*--)[\w.+=][\w.+=-]*")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: a method (or chain) at one budget, over all tasks.

    Args:
        group: Method as the table calls it; seeds of a group are averaged there.
        chain: Compressors; none for the uncompressed model.
        keep_ratio: What the plan asked, None when the method brings its own budget.
        seed: Seed of a randomised method, when the plan lists several.
    """

    group: str
    chain: tuple[Compressor, ...] = ()
    keep_ratio: float | None = None
    seed: int | None = None

    @property
    def key(self) -> str:
        """Unique in the plan; also the name of its file."""
        ratio = "" if self.keep_ratio is None else f"--{self.keep_ratio:g}"
        return f"{self.group}{ratio}" + ("" if self.seed is None else f"--seed{self.seed}")

    @property
    def control(self) -> bool:
        """Whether all of the chain are controls; False for the uncompressed model."""
        found = [method.evidence == "control" for method in self.chain]
        return bool(found) and all(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with every hyper-parameter."""
        return {
            "key": self.key,
            "group": self.group,
            "methods": [to_mapping(method) for method in self.chain],
            "control": self.control,
            "keep_ratio": self.keep_ratio,
            "seed": self.seed,
        }


def cells_of(entry: Entry, keep_ratios: tuple[float, ...], budget: BudgetMeaning) -> list[Cell]:
    """The cells of one entry of a plan's `methods`.

    Args:
        entry: As `Plan.methods` says.
        keep_ratios: The plan's; they apply to an entry without a budget of its own.
        budget: What they mean.

    Raises:
        ConfigError: The entry is malformed.
        UnsupportedMethodError: Unknown method.
        BudgetError: A keep ratio is out of range.
    """
    data = {"method": entry} if isinstance(entry, str) else entry
    if not isinstance(data, Mapping):
        raise ConfigError(f"a method must be a name or a mapping, got {entry!r}")
    rest = {str(key): value for key, value in data.items() if key not in _OWN_KEYS}
    made = from_mapping(rest, f"method {entry!r}")
    label = data.get("label")
    if isinstance(made, list):
        if "seeds" in data or "keep_ratios" in data:
            raise ConfigError("a chain takes no seeds and no keep_ratios; set them in its parts")
        name = "+".join(method.name for method in made)
        return [Cell(group=_label(label, name), chain=tuple(made))]
    ratios = _list("keep_ratios", data.get("keep_ratios", keep_ratios))
    field = "mean_keep_ratio" if budget == "mean" else "keep_ratio"
    cells = []
    for ratio in ratios if ratios and takes_ratio(made) else (None,):
        for seed in _list("seeds", data.get("seeds", ())) or (None,):
            asked = {} if ratio is None else {field: ratio}
            drawn = {} if seed is None else {"seed": seed}
            own = {key: value for key, value in rest.items() if key != "method"}
            method = make_compressor(made.name, **own, **asked, **drawn)
            group = _label(label, made.name)
            cells.append(Cell(group=group, chain=(method,), keep_ratio=ratio, seed=seed))
    return cells


def takes_ratio(method: Compressor) -> bool:
    """Whether a keep ratio can be set: there is no budget yet, and the method takes one."""
    if not method.takes_budget or any(getattr(method, name) is not None for name in BUDGETS):
        return False
    try:
        replace(method, keep_ratio=0.5)
    except BudgetError:
        return False
    return True


def _label(given: Any, default: str) -> str:
    label = default if given is None else str(given)
    if not _LABEL.fullmatch(label) or label == UNCOMPRESSED:
        raise ConfigError(
            f"a label has letters, digits and . + = - _ and is not {UNCOMPRESSED!r}: got {label!r}"
        )
    return label


def _list(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} must be a list, got {value!r}")
    return tuple(value)
