"""Tasks described in YAML: which dataset, which columns, how it is asked and how it is scored."""

import json
import string
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from vispress.bench.tasks.metrics import METRICS
from vispress.bench.tasks.rows import fingerprint
from vispress.bench.tasks.task import Task, register_task
from vispress.checks import check_integer, check_number, suggest
from vispress.errors import ConfigError
from vispress.yaml_files import check_keys, read_yaml, shipped_files

D = TypeVar("D")


@dataclass(frozen=True, kw_only=True)
class Join:
    """Pictures that lie in another subset of the same dataset, found by a key.

    Args:
        subset: Its name.
        split: Its split.
        key: Column there that the image column of the questions refers to.
        image: Column there with the picture.
    """

    subset: str
    split: str
    key: str = "id"
    image: str = "image"


@dataclass(frozen=True, kw_only=True)
class YamlTask:
    """A task over a dataset, as its YAML file has it.

    Args:
        name: What plans call it.
        dataset: A `.jsonl`, `.parquet`, `.csv` or `.json` file, a folder, or a hub id; paths start
            at the YAML file.
        question: Column with the question.
        answer: Column with the answer: words, a list of accepted words, or for a choice its letter,
            its index from 0 or its words.
        metric: `exact`, `contains`, `yes_no`, `vqa`, `anls`, `number` or `choice`.
        images: Columns with pictures or lists of them, in order. Rows without one are left out.
        choices: For `choice`: a column with the list of options, one column an option, or, where
            the question's text lists them, their number.
        prompt: Template over the columns, `{question}` and `{options}` ("A. ..." a line). Lines
            whose fields are all empty are left out. Pictures come first, unless the text has as
            many `<image>` marks as there are pictures.
        subset: Configuration of a hub dataset.
        split: Its split; a single file has none.
        revision: Of a hub dataset.
        images_from: Where the pictures are, if not in the rows.
        where: Only rows whose column has this value, or one of these.
        limit: Most questions that are asked.
        shuffle: Draw rows in random order, else in the order of the dataset.
        seed: Of that order; None for the plan's.
        chance: Score of the best constant answer, or of guessing, in `[0, 1]`.
        needs: Which visual tokens an answer needs, in words.

    Raises:
        ConfigError: A value is out of range, or choices and metric do not fit each other.
    """

    name: str
    dataset: str
    question: str = "question"
    answer: str = "answer"
    metric: str = "exact"
    images: str | tuple[str, ...] = "image"
    choices: str | tuple[str, ...] | int | None = None
    prompt: str = "{question}"
    subset: str | None = None
    split: str = "test"
    revision: str | None = None
    images_from: Join | None = None
    where: Mapping[str, Any] | None = None
    limit: int | None = None
    shuffle: bool = True
    seed: int | None = None
    chance: float = 0.0
    needs: str = "not known"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ConfigError(
                f"{self._at}: unknown metric {self.metric!r}; {suggest(self.metric, METRICS)}"
            )
        if (self.metric == "choice") != (self.choices is not None):
            raise ConfigError(f"{self._at}: metric 'choice' and the key 'choices' go together")
        check_number(f"{self._at}: chance", self.chance, low=0.0, high=1.0)
        for key, low in (("limit", 1), ("seed", 0), ("choices", 2)):
            value = getattr(self, key)
            if isinstance(value, int):
                check_integer(f"{self._at}: {key}", value, low=low)
        self.template()

    @property
    def _at(self) -> str:
        return f"task {self.name!r}"

    def template(self) -> list[list[tuple[str, str | None]]]:
        """Split the prompt into lines of (text, column or None) parts.

        Raises:
            ConfigError: It is malformed, or a field is more than a column's name.
        """
        lines: list[list[tuple[str, str | None]]] = []
        for line in self.prompt.splitlines():
            try:
                parts = list(string.Formatter().parse(line))
            except ValueError as error:
                raise ConfigError(f"{self._at}: prompt {self.prompt!r}: {error}") from error
            if any(field == "" or form or conversion for _, field, form, conversion in parts):
                raise ConfigError(f"{self._at}: fields of a prompt are bare column names: {line!r}")
            lines.append([(text, field) for text, field, _, _ in parts])
        return lines


def register_entry(entry: Any, base: Path) -> str:
    """Name an entry of a plan's `tasks`; a YAML task becomes known by its name.

    Args:
        entry: A name, the path of a YAML file, or a mapping like such a file's.
        base: Folder that paths start at.

    Raises:
        ConfigError: The description is malformed, or its name is taken by a task without dataset.
    """
    if isinstance(entry, str) and entry.endswith((".yaml", ".yml")):
        path = base / entry
        return register_task(task_from_yaml(*_read(path if path.is_file() else Path(entry)))).name
    if isinstance(entry, Mapping):
        return register_task(task_from_yaml(parse_yaml_task(entry, "task"), base)).name
    return str(entry)


def shipped_task(name: str) -> Task | None:
    """Find the task of that name in `configs/tasks`, or None."""
    path = shipped_files("tasks").get(name)
    return None if path is None else task_from_yaml(*_read(path))


def shipped_tasks() -> list[str]:
    """List the names of the shipped YAML tasks."""
    return sorted(shipped_files("tasks"))


def parse_yaml_task(data: Any, where: str) -> YamlTask:
    """Build a YAML task from parsed YAML.

    Raises:
        ConfigError: A key is unknown, missing or of the wrong type; see also `YamlTask`.
    """
    values = check_keys(data, YamlTask, where)
    if (join := values.get("images_from")) is not None:
        values["images_from"] = _build(Join, check_keys(join, Join, f"{where}, images_from"), where)
    for key in ("images", "choices"):
        if isinstance(values.get(key), list):
            values[key] = tuple(values[key])
    return _build(YamlTask, values, where)


def task_from_yaml(description: YamlTask, base: Path) -> Task:
    """Build the task of a YAML file; its dataset is opened when questions are drawn."""
    from vispress.bench.tasks.prompts import draw, score

    mark = fingerprint(description.dataset, base)
    source = asdict(description) | ({} if mark is None else {"fingerprint": mark})
    return Task(
        name=description.name,
        needs=description.needs,
        chance=description.chance,
        draw=partial(draw, description, base),
        score=partial(score, METRICS[description.metric]),
        source=json.loads(json.dumps(source)),
        folder=str(base.absolute()),
    )


def stored_task(source: Mapping[str, Any], folder: Path) -> Task:
    """Make a task again from what a run stored of it.

    Args:
        source: As `Task.source` was.
        folder: Where its paths start.

    Raises:
        ConfigError: The description is damaged, or the dataset is gone or another one now.
    """
    description = {key: value for key, value in source.items() if key != "fingerprint"}
    task = task_from_yaml(parse_yaml_task(description, "the stored task"), folder)
    if task.source != source:
        raise ConfigError(f"{source.get('dataset')} is not what it was: its fingerprint differs")
    return task


def _read(path: Path) -> tuple[YamlTask, Path]:
    data = read_yaml(path, "the task")
    if isinstance(data, Mapping):
        data = {"name": path.stem} | dict(data)
    return parse_yaml_task(data, str(path)), path.parent


def _build(cls: type[D], values: dict[str, Any], where: str) -> D:
    """Build an object of a dataclass, its fields checked against their annotations."""
    for field in fields(cls):  # type: ignore[arg-type]
        required = field.default is MISSING
        if required and field.name not in values:
            raise ConfigError(f"{where}: the key {field.name!r} is missing")
        value = values.get(field.name, field.default)
        if not _fits(value, field.type):
            hint = getattr(field.type, "__name__", field.type)
            raise ConfigError(f"{where}: {field.name} must be {hint}, got {value!r}")
    return cls(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value is of an annotated type (unions, tuples of words, plain classes)."""
    if isinstance(hint, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if (origin := get_origin(hint)) is tuple:
        return isinstance(value, tuple) and value != () and all(isinstance(v, str) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int and isinstance(value, bool):
        return False
    return isinstance(value, origin or hint)
