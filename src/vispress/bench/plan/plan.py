"""A benchmark plan: which questions, which model, compressed how. YAML in, cells out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

from vispress.bench.model.loaded_model import DTYPES, Dtype
from vispress.bench.plan.cells import UNCOMPRESSED, BudgetMeaning, Cell, Entry, cells_of
from vispress.bench.plan.controls import ALL, Controls, Overrides, expand, with_controls
from vispress.bench.plan.files import plan_path
from vispress.bench.plan.provenance import digest
from vispress.bench.plan.published import load_published
from vispress.bench.tasks.task import check_tasks, get_task
from vispress.bench.tasks.yaml_task import register_entry
from vispress.checks import check_choice, check_integer
from vispress.errors import ConfigError
from vispress.types import Positions
from vispress.user_code import import_files
from vispress.yaml_files import check_keys, read_yaml


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Settings of measuring cost, interleaved with the uncompressed model.

    Args:
        batch: Prompts of equal length in the timed batch; 0 measures nothing.
        rounds: Alternations; the first is warm-up.
        repeats: Timed runs of each variant a round.
        decode_tokens: Tokens generated behind the first in a timed run; 0 times no decoding.
    """

    batch: int = 8
    rounds: int = 6
    repeats: int = 3
    decode_tokens: int = 8


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A benchmark's plan; `load_plan` reads one from YAML.

    Args:
        tasks: Names of tasks. A YAML plan may also describe one in place, or name a YAML file that
            does (see `YamlTask`).
        methods: A name, a mapping as in a method's YAML, a `chain` of such mappings, or a
            `compressor`: a folder of `save_compression`, relative to the working directory, or
            `"reference"` and `"reference-qwen"` for the shipped ones. Fields beside a `compressor`
            replace those of the folder, `keep_ratios` its budget. A mapping may add `label` (its
            name in tables), `seeds` (one cell each) and `keep_ratios` (in place of the plan's; `[]`
            for the method's own budget). `"all"` is every registered method that is no control;
            those that cannot reach a budget are listed as not run.
        keep_ratios: Each in `(0, 1]`.
        budget: What a keep ratio means: `"mean"` is the mean of visual tokens over decoder layers,
            equal cost for all; `"placement"` is what one placement keeps.
        model: `"reference"`, `"reference-qwen"`, `"reference-qwen-clips"`, or a folder that
            `vispress train-reference` wrote.
        questions: For each task, at least 1.
        batch_size: Prompts a batch.
        seed: Of questions and bootstrap.
        positions: As in `compress_model`; None for each method's default.
        max_new_tokens: Longest answer.
        timing: How cost is measured.
        overrides: Hyper-parameters by method, for the methods of `"all"`.
        controls: `"standard"` adds what is missing of random (three seeds), uniform, average
            pooling, down-sampling and oracle at every keep ratio, no image and VTW; `"none"` adds
            nothing.
        dtype: Of weights and computation.
        published: What papers print of this model: the name of a file of `configs/published`, which
            results are shown beside.
        imports: Python files of the user's that were run, by name, with the beginning of each one's
            SHA-256. In YAML it is `import`, a list of paths that start at the plan: they are run
            when the plan is read, and register methods or tasks that it names.

    Raises:
        ConfigError: A value is out of range, or a task is unknown.
        UnsupportedMethodError: A method is unknown.
        BudgetError: A keep ratio is out of range.
    """

    tasks: tuple[str, ...]
    methods: tuple[Entry, ...]
    keep_ratios: tuple[float, ...]
    budget: BudgetMeaning = "mean"
    model: str = "reference"
    questions: int = 100
    batch_size: int = 32
    seed: int = 0
    positions: Positions | None = None
    max_new_tokens: int = 4
    timing: Timing = field(default_factory=Timing)
    overrides: Overrides = field(default_factory=dict)
    controls: Controls = "standard"
    dtype: Dtype = "fp32"
    published: str | None = None
    imports: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("questions", "batch_size", "max_new_tokens"):
            check_integer(name, getattr(self, name), low=1)
        check_integer("seed", self.seed, low=0)
        for name, low in (("batch", 0), ("rounds", 2), ("repeats", 1), ("decode_tokens", 0)):
            check_integer(f"timing.{name}", getattr(self.timing, name), low=low)
        check_choice("budget", self.budget, get_args(BudgetMeaning))
        check_choice("positions", self.positions, (None, *get_args(Positions)))
        check_tasks([str(task) for task in self.tasks])
        check_choice("controls", self.controls, get_args(Controls))
        check_choice("dtype", self.dtype, tuple(DTYPES))
        if self.published is not None:
            load_published(self.published)
        if not isinstance(self.overrides, Mapping):
            raise ConfigError(f"overrides must be a mapping by method, got {self.overrides!r}")
        self.cells()

    def cells(self) -> tuple[Cell, ...]:
        """List the cells: the uncompressed model, then every method at every keep ratio."""
        cells = [Cell(group=UNCOMPRESSED)]
        methods: Sequence[Entry] = self.methods
        if self.controls == "standard":
            methods = with_controls(methods, budgets=bool(self.keep_ratios))
        for entry, optional in expand(methods, self.overrides):
            cells += cells_of(entry, self.keep_ratios, self.budget, optional=optional)
        keys = [cell.key for cell in cells]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"two cells are called {key!r}; give their methods a label each")
        return tuple(cells)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data, with every cell spelt out."""
        data = asdict(self)
        for name in ("published", "imports"):  # plans without these keep their hash
            if not data[name]:
                del data[name]
        data |= {"cells": [cell.to_dict() for cell in self.cells()]}
        sources = {name: get_task(name).source for name in self.tasks}
        data |= (
            {"sources": datasets} if (datasets := {k: v for k, v in sources.items() if v}) else {}
        )
        return cast("dict[str, Any]", json.loads(json.dumps(data)))

    def digest(self) -> str:
        """Hash everything that decides the results."""
        return digest(self.to_dict())


def load_plan(source: str | Path, *, imports: Sequence[Path] = (), **overrides: Any) -> Plan:
    """Read a plan.

    Args:
        source: A file, or the name of a shipped plan.
        imports: Python files to run first, beside those that the plan names.
        **overrides: Fields that replace the file's, where not None.

    Raises:
        ConfigError: The file is missing or malformed; see also `Plan`.
    """
    path = plan_path(str(source))
    run = import_files(imports)
    plan = plan_from_mapping(read_yaml(path, "the plan"), str(path))
    if run:
        plan = replace(plan, imports={**plan.imports, **run})
    changes = {name: value for name, value in overrides.items() if value is not None}
    return replace(plan, **changes) if changes else plan


def plan_from_mapping(data: Any, where: str = "plan") -> Plan:
    """Build a plan from parsed YAML.

    Raises:
        ConfigError: A key is unknown, missing or of the wrong type; see also `Plan`.
    """
    data = check_keys(data, Plan, where, written={"imports": "import"})
    base = Path(where).parent if Path(where).is_file() else Path()
    data["imports"] = import_files(_paths(data.pop("import", None) or [], where), base)
    if data.get("methods") == ALL:
        data["methods"] = [ALL]
    for name in ("tasks", "methods", "keep_ratios"):
        if not isinstance(data.get(name), list):
            raise ConfigError(f"{where}: {name} must be a list, got {data.get(name)!r}")
        data[name] = tuple(data[name])
    data["tasks"] = tuple(register_entry(entry, base) for entry in data["tasks"])
    data["timing"] = Timing(**check_keys(data.get("timing") or {}, Timing, f"{where}, timing"))
    return Plan(**data)


def _paths(value: Any, where: str) -> list[str]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise ConfigError(f"{where}: import must be a list of Python files, got {value!r}")
    return listed
