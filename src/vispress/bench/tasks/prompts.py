"""From the rows of a described dataset to prompts, and from answers to scores."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

from vispress.bench.tasks.metrics import LETTERS, Metric
from vispress.bench.tasks.rows import Row, Rows, Undecoded, load_rows, local_path, open_pictures
from vispress.bench.tasks.task import MARK, Prompt
from vispress.bench.tasks.yaml_task import YamlTask
from vispress.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

_NOTHING: Final = ("", "nan")


@dataclass(frozen=True, slots=True)
class DatasetPrompt(Prompt):
    """A question of a dataset.

    Args:
        accepted: Every right answer; `answer` is the commonest. For a choice, the letter.
        choices: The options' words, in order.
    """

    accepted: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


def score(metric: Metric, prediction: str, prompt: Prompt) -> float:
    """Score a prediction by a metric, in `[0, 1]`."""
    assert isinstance(prompt, DatasetPrompt)  # `draw` makes no others
    return metric(prediction, prompt.accepted, prompt.choices)


def draw(task: YamlTask, base: Path, n: int, seed: int) -> list[Prompt]:
    """Draw up to `n` questions: fewer if the dataset, or the task's limit, has no more.

    Args:
        task: What to read.
        base: Folder that its paths start at.
        n: How many.
        seed: Of the order, unless the task has one of its own.

    Raises:
        ConfigError: The dataset cannot be read, a column is missing, or no row fits.
    """
    options: dict[str, Any] = {"base": base, "revision": task.revision}
    rows = load_rows(task.dataset, subset=task.subset, split=task.split, **options)
    _check_columns(task, rows)
    pictures = None if task.images_from is None else _joined(task, options)
    order = list(range(len(rows)))
    if task.shuffle:
        Random(seed if task.seed is None else task.seed).shuffle(order)
    prompts: list[Prompt] = []
    for row in (rows[i] for i in order):
        if len(prompts) == min(n, task.limit or n):
            break
        if _wanted(task, row) and (images := _images(task, row, base, pictures)):
            prompts.append(_prompt(task, row, tuple(images)))
    if not prompts:
        raise ConfigError(f"task {task.name!r}: none of {len(rows)} rows has a picture and fits")
    return prompts


def _check_columns(task: YamlTask, rows: Rows) -> None:
    """Check that every column that the task names is there, once, by the first row's names."""
    known = getattr(rows, "column_names", None) or list(rows[0] if rows else ())
    asked = {"question": [task.question], "answer": [task.answer], "images": _listed(task.images)}
    asked["choices"] = [] if isinstance(task.choices, int) else _listed(task.choices)
    asked["where"] = list(task.where or ())
    fields = {field for line in task.template() for _, field in line if field is not None}
    asked["prompt"] = sorted(fields - {"question", "options"})
    for key, columns in asked.items():
        for column in columns:
            if column not in known:
                raise ConfigError(
                    f"task {task.name!r}: {task.dataset} has no column {column!r} (named by "
                    f"{key!r}); it has {', '.join(map(str, known)) or 'no rows'}"
                )


def _listed(columns: str | tuple[str, ...] | None) -> list[str]:
    return [columns] if isinstance(columns, str) else list(columns or ())


def _wanted(task: YamlTask, row: Row) -> bool:
    for column, value in (task.where or {}).items():
        if row[column] not in (value if isinstance(value, list) else [value]):
            return False
    return True


def _joined(task: YamlTask, options: dict[str, Any]) -> tuple[dict[Any, int], Rows]:
    """Find the place of each key, and the rows with the pictures, which are read when asked for."""
    join = task.images_from
    assert join is not None
    rows = load_rows(task.dataset, subset=join.subset, split=join.split, **options)
    known = getattr(rows, "column_names", None) or list(rows[0] if rows else ())
    for column in (join.key, join.image):
        if column not in known:
            raise ConfigError(
                f"task {task.name!r}: {task.dataset}, {join.subset}, has no column {column!r}; "
                f"it has {', '.join(map(str, known))}"
            )
    keys = rows.column(join.key) if isinstance(rows, Undecoded) else [r[join.key] for r in rows]
    return {key: place for place, key in enumerate(keys)}, rows


def _images(
    task: YamlTask, row: Row, base: Path, pictures: tuple[dict[Any, int], Rows] | None
) -> list["Image"]:
    path = local_path(task.dataset, base)
    folder = base if path is None else path if path.is_dir() else path.parent
    images: list[Image] = []
    for column in _listed(task.images):
        value = row[column]
        if pictures is not None:
            places, rows = pictures
            if value not in places:
                raise ConfigError(f"task {task.name!r}: no picture has the key {value!r}")
            assert task.images_from is not None
            value = rows[places[value]][task.images_from.image]
        images += open_pictures(value, folder)
    return images


def _prompt(task: YamlTask, row: Row, images: tuple["Image", ...]) -> DatasetPrompt:
    choices = tuple(_options(task, row))
    accepted = _accepted(task, row[task.answer], choices)
    lines = [f"{letter}. {words}" for letter, words in zip(LETTERS, choices, strict=False) if words]
    values = {**row, "question": row[task.question], "options": "\n".join(lines)}
    text = "\n".join(_filled(task, values))
    if text.count(MARK) != len(images):
        text = MARK * len(images) + "\n" + text.replace(MARK, "").strip()
    return DatasetPrompt(
        images=images,
        text=text,
        answer=Counter(accepted).most_common(1)[0][0],
        accepted=accepted,
        choices=choices,
    )


def _filled(task: YamlTask, values: Mapping[str, Any]) -> Iterator[str]:
    """Fill in the fields of the prompt's lines; lines with nothing but empty ones go."""
    for line in task.template():
        filled = [_shown(values[field]) for _, field in line if field is not None]
        if not filled or any(filled):
            rest = iter(filled)
            yield "".join(text + ("" if field is None else next(rest)) for text, field in line)


def _shown(value: Any) -> str:
    text = "" if value is None else str(value).strip()
    return "" if text.casefold() in _NOTHING else text


def _options(task: YamlTask, row: Row) -> list[str]:
    if task.choices is None:
        return []
    if isinstance(task.choices, int):
        return [""] * task.choices
    if isinstance(task.choices, str):
        options = row[task.choices]
        if not isinstance(options, list | tuple) or len(options) < 2:
            raise ConfigError(
                f"task {task.name!r}: column {task.choices!r} must hold a list of options, "
                f"got {options!r}"
            )
        return [str(option) for option in options]
    # a question with fewer options than others leaves the last columns empty
    return [text for column in task.choices if (text := _shown(row[column]))]


def _accepted(task: YamlTask, value: Any, choices: tuple[str, ...]) -> tuple[str, ...]:
    if task.choices is None:
        listed = value if isinstance(value, list | tuple) else [value]
        answers = tuple(str(answer).strip() for answer in listed if answer is not None)
        if not answers:
            raise ConfigError(f"task {task.name!r}: a row has no answer, got {value!r}")
        return answers
    letters = LETTERS[: len(choices)]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(letters):
        return (letters[value],)
    text = str(value).strip()
    if len(text) == 1 and text.upper() in letters:
        return (text.upper(),)
    if text in choices:
        return (letters[choices.index(text)],)
    raise ConfigError(f"task {task.name!r}: the answer {value!r} is none of {list(choices)}")
