"""A benchmark plan: which questions, which model, compressed how. YAML in, cells out."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from vispress.bench.tasks import get_task, suggest
from vispress.config import from_mapping, make_compressor, to_mapping
from vispress.errors import BudgetError, ConfigError
from vispress.methods.base import Compressor
from vispress.types import Positions

BudgetMeaning = Literal["mean", "placement"]
UNCOMPRESSED = "none"
_OWN_KEYS = ("label", "seeds", "keep_ratios")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How prefill is measured, interleaved with the uncompressed model.

    Args:
        batch: Prompts of equal length in the timed batch; 0 measures nothing.
        rounds: Alternations; the first is warm-up.
        repeats: Timed prefills of each model a round.
    """

    batch: int = 8
    rounds: int = 6
    repeats: int = 3


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

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with every hyper-parameter."""
        return {
            "key": self.key,
            "group": self.group,
            "methods": [to_mapping(method) for method in self.chain],
            "keep_ratio": self.keep_ratio,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a benchmark does; `load_plan` reads one from YAML.

    Args:
        tasks: Names of tasks.
        methods: A name, a mapping as in a method's YAML, or a `chain` of such mappings. A mapping
            may add `label` (its name in tables), `seeds` (one cell each) and `keep_ratios` (in
            place of the plan's; `[]` for the method's own budget).
        keep_ratios: Each in `(0, 1]`.
        budget: What a keep ratio means: `"mean"` is the mean of visual tokens over decoder layers,
            equal cost for all; `"placement"` is what one placement keeps.
        model: `"reference"`, or a folder that `vispress train-reference` wrote.
        questions: For each task, at least 1.
        batch_size: Prompts a batch.
        seed: Of questions and bootstrap.
        positions: As in `compress_model`; None for each method's default.
        max_new_tokens: Longest answer.
        timing: How prefill is measured.

    Raises:
        ConfigError: A value is out of range, or a task is unknown.
        UnsupportedMethodError: A method is unknown.
        BudgetError: A keep ratio is out of range.
    """

    tasks: tuple[str, ...]
    methods: tuple[str | Mapping[str, Any], ...]
    keep_ratios: tuple[float, ...]
    budget: BudgetMeaning = "mean"
    model: str = "reference"
    questions: int = 100
    batch_size: int = 32
    seed: int = 0
    positions: Positions | None = None
    max_new_tokens: int = 4
    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        for name in ("questions", "batch_size", "max_new_tokens"):
            _integer(name, getattr(self, name), low=1)
        _integer("seed", self.seed, low=0)
        for name, low in (("batch", 0), ("rounds", 2), ("repeats", 1)):
            _integer(f"timing.{name}", getattr(self.timing, name), low=low)
        _choice("budget", self.budget, get_args(BudgetMeaning))
        _choice("positions", self.positions, (None, *get_args(Positions)))
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"tasks must be a list of different names, got {list(self.tasks)}")
        for task in self.tasks:
            get_task(task)
        self.cells()

    def cells(self) -> tuple[Cell, ...]:
        """The uncompressed model first, then every method at every keep ratio."""
        cells = [Cell(group=UNCOMPRESSED)]
        for entry in self.methods:
            cells += _cells(entry, self.keep_ratios, self.budget)
        keys = [cell.key for cell in cells]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"two cells are called {key!r}; give their methods a label each")
        return tuple(cells)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with every cell spelt out."""
        data = asdict(self) | {"cells": [cell.to_dict() for cell in self.cells()]}
        return cast("dict[str, Any]", json.loads(json.dumps(data)))

    def digest(self) -> str:
        """Hash of everything that decides the results."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan_path(name: str) -> Path:
    """The file of a plan: a path, or the name of a shipped one.

    Raises:
        ConfigError: There is neither.
    """
    if (path := Path(name)).is_file():
        return path
    package = Path(__file__).parents[1]
    # an installed package holds the configs; in a checkout they lie beside src/
    homes = (package / "configs" / "bench", package.parents[1] / "configs" / "bench")
    for home in homes:
        if (path := home / f"{name}.yaml").is_file():
            return path
    shipped = sorted({p.stem for home in homes if home.is_dir() for p in home.glob("*.yaml")})
    raise ConfigError(f"no plan {name!r}: no such file, and {suggest(name, shipped)}")


def load_plan(source: str | Path, **overrides: Any) -> Plan:
    """Read a plan.

    Args:
        source: A file, or the name of a shipped plan.
        **overrides: Fields that replace the file's, where not None.

    Raises:
        ConfigError: The file is missing or malformed; see also `Plan`.
    """
    import yaml

    path = plan_path(str(source))
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the plan {path}: {error}") from error
    plan = plan_from_mapping(data, str(path))
    given = {name: value for name, value in overrides.items() if value is not None}
    return replace(plan, **given) if given else plan


def plan_from_mapping(data: Any, where: str = "plan") -> Plan:
    """A plan from parsed YAML.

    Raises:
        ConfigError: A key is unknown, missing or of the wrong type; see also `Plan`.
    """
    data = _mapping(data, Plan, where)
    for name in ("tasks", "methods", "keep_ratios"):
        if not isinstance(data.get(name), list):
            raise ConfigError(f"{where}: {name} must be a list, got {data.get(name)!r}")
        data[name] = tuple(data[name])
    data["timing"] = Timing(**_mapping(data.get("timing") or {}, Timing, f"{where}, timing"))
    return Plan(**data)


def _mapping(data: Any, cls: type, where: str) -> dict[str, Any]:
    known = [f.name for f in fields(cls)]
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be a mapping with the keys {', '.join(known)}")
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; {suggest(key, known)}")
    return dict(data)


def _cells(
    entry: str | Mapping[str, Any], ratios: tuple[float, ...], budget: BudgetMeaning
) -> list[Cell]:
    """The cells of one entry of `methods`."""
    data = {"method": entry} if isinstance(entry, str) else entry
    if not isinstance(data, Mapping):
        raise ConfigError(f"a method must be a name or a mapping, got {entry!r}")
    own = {key: data[key] for key in _OWN_KEYS if key in data}
    rest = {str(key): value for key, value in data.items() if key not in _OWN_KEYS}
    if "keep_ratios" in own:
        ratios = _list("keep_ratios", own["keep_ratios"])
    made = from_mapping(rest, f"method {entry!r}")
    chain = tuple(made) if isinstance(made, list) else (made,)
    label = str(own.get("label", "+".join(method.name for method in chain)))
    if not re.fullmatch(r"[\w.+=-]+", label) or label == UNCOMPRESSED or "--" in label:
        raise ConfigError(f"label must be letters, digits and . + = - _, not 'none': got {label!r}")
    if len(chain) > 1 or not ratios or not _takes_ratio(chain[0]):
        asked: list[dict[str, Any]] = [{}]
    else:
        name = "mean_keep_ratio" if budget == "mean" else "keep_ratio"
        asked = [{name: ratio} for ratio in ratios]
    seeds: list[dict[str, Any]] = [{"seed": s} for s in _list("seeds", own.get("seeds", []))] or [
        {}
    ]
    if seeds != [{}] and len(chain) > 1:
        raise ConfigError(f"{label}: seeds cannot be given for a chain; set them in its parts")
    cells = []
    for ratio in asked:
        for seed in seeds:
            values = rest | ratio | seed
            parts = (make_compressor(**_renamed(values)),) if ratio or seed else chain
            number = next(iter(ratio.values()), None)
            cells.append(Cell(group=label, chain=parts, keep_ratio=number, seed=seed.get("seed")))
    return cells


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {("name" if key == "method" else key): value for key, value in values.items()}


def _takes_ratio(method: Compressor) -> bool:
    """Whether the plan's keep ratios apply: the entry has no budget, and the method takes one."""
    budgets = ("keep_ratio", "num_tokens", "mean_keep_ratio")
    if any(getattr(method, name) is not None for name in budgets):
        return False
    try:
        replace(method, keep_ratio=0.5)
    except BudgetError:
        return False
    return True


def _list(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} must be a list, got {value!r}")
    return tuple(value)


def _integer(name: str, value: Any, *, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be an integer >= {low}, got {value!r}")


def _choice(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name} must be one of {known}, got {value!r}")
