"""Tasks by name: where questions come from, what blind guessing earns, which tokens they need."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from vispress.checks import suggest
from vispress.errors import ConfigError
from vispress.extras import SCENES, check_packages

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from vispress.reference.world.words import ClipKind, EpisodeKind, LargeKind, QuestionKind

MARK: Final = "<image>"
"""Where a picture stands in a prompt's text."""
EVIDENCE_GRID: Final = 12
"""Rows, and columns, of the raster that `Prompt.evidence` counts in."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question with its pictures or videos and its only right answer.

    Args:
        images: Pictures in the order of their `<image>` marks.
        text: What the processor is given.
        answer: Compared with the model's words, exactly.
        evidence: For each picture, then for each video, the cells of a 12 x 12 raster over it
            (`EVIDENCE_GRID`) that hold the answer, whatever the model's own grid; empty where
            unknown. Cells of a video's frame `f` count from `144 * f`.
        followups: Later turns of a conversation, (text, answer) each, asked on the same cache.
            The whole conversation is right or wrong.
        videos: uint8 (F, height, width, 3) each, in the order of their `<video>` marks.
    """

    images: tuple["Image", ...]
    text: str
    answer: str
    evidence: tuple[tuple[int, ...], ...] = ()
    followups: tuple[tuple[str, str], ...] = ()
    videos: tuple["NDArray[np.uint8]", ...] = field(default=(), compare=False)

    @property
    def visuals(self) -> int:
        """How many pictures and videos it has."""
        return len(self.images) + len(self.videos)

    @property
    def answer_text(self) -> str:
        """All answers, joined by `" / "`: what a right conversation reads."""
        return " / ".join((self.answer, *(answer for _, answer in self.followups)))


Score = Callable[[str, Prompt], float]
RIGHT: Final = 0.5
"""The least score of what counts as right."""


def exact(prediction: str, prompt: Prompt) -> float:
    """Score 1.0 if the model's words are the answer, letter by letter, else 0.0."""
    return float(prediction == prompt.answer_text)


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of question.

    Args:
        name: What plans call it.
        needs: Which visual tokens an answer needs, in words.
        chance: Accuracy of the best guess from the words alone, in `[0, 1]`.
        draw: `draw(n, seed)` gives `n` prompts, always the same ones; the first `m` of a larger
            draw need not be those of a draw of `m`.
        score: `score(prediction, prompt)` in `[0, 1]`, 1.0 is fully right.
        source: What decides the questions beside the name (a dataset and how it is read), as plain
            data; None where the name and the commit decide. It is part of a plan's identity.
        shows: What its prompts show.
        folder: Where paths of its description start, None where the name and the commit decide.
    """

    name: str
    needs: str
    chance: float
    draw: Callable[[int, int], list[Prompt]]
    score: Score = exact
    source: Mapping[str, Any] | None = None
    shows: Literal["pictures", "videos"] = "pictures"
    folder: str | None = None


_TASKS: dict[str, Task] = {}

_NEEDS = {
    "attribute": "the few tokens of one object",
    "place": "the tokens of one ninth of the picture",
    "existence": "the tokens of every candidate",
    "needle": "one or two tokens: a dot inside an object",
    "digit": "all strokes of one handwritten digit",
    "reading": "two adjacent printed digits",
    "where": "one object, and where its tokens lie",
    "relation": "two objects, and where their tokens lie",
    "count": "every object of a kind",
    "compare": "one object in one of two pictures, and which picture that is",
    "in_context": "one object of the last picture; two examples say which",
    "multi_turn": "other tokens at every turn: a later question was not known at prefill",
    "order": "two objects that are each in one frame of three",
    "change": "one object, in the frames before and after it changed",
    "fine_print": "two printed digits that only a crop resolves",
    "small_object": "a dot inside an object that is small in the thumbnail",
    "across_crops": "two objects that stand in different crops, and where",
    "clip_order": "two objects that are each in one or two of a video's six steps",
    "clip_change": "one object, in the steps of a video before and after it changed",
}


def register_task(task: Task) -> Task:
    """Make a task available to plans; a dataset's description may be replaced by a newer one.

    Raises:
        ConfigError: The name is taken.
    """
    known = all_tasks().get(task.name)
    if known is not None and (known.source is None or task.source is None):
        raise ConfigError(f"task {task.name!r} is already registered")
    _TASKS[task.name] = task
    return task


def all_tasks() -> dict[str, Task]:
    """List every task by name, the reference model's first.

    Raises:
        ConfigError: A package is missing that draws their pictures.
    """
    check_packages(SCENES, "the benchmark's own tasks")
    from vispress.reference.world.clips import CLIP_CHANCE
    from vispress.reference.world.episodes import EPISODE_CHANCE
    from vispress.reference.world.large import LARGE_CHANCE
    from vispress.reference.world.questions import CHANCE
    from vispress.reference.world.words import CLIP_KINDS, EPISODE_KINDS, KINDS, LARGE_KINDS

    tasks: dict[str, Task] = {
        kind: Task(kind, _NEEDS[kind], CHANCE[kind], _drawer(kind)) for kind in KINDS
    }
    for kind in EPISODE_KINDS:
        tasks[kind] = Task(kind, _NEEDS[kind], EPISODE_CHANCE[kind], _episode_drawer(kind))
    for large in LARGE_KINDS:
        tasks[large] = Task(large, _NEEDS[large], LARGE_CHANCE[large], _large_drawer(large))
    for clip in CLIP_KINDS:
        tasks[clip] = Task(
            clip, _NEEDS[clip], CLIP_CHANCE[clip], _clip_drawer(clip), shows="videos"
        )
    return tasks | _TASKS


def check_tasks(names: Sequence[str]) -> None:
    """Check that different tasks are named, and that all are known.

    Raises:
        ConfigError: There is no name, one stands twice, or a task is unknown.
    """
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"tasks must be a list of different names, got {list(names)}")
    for name in names:
        get_task(name)


def get_task(name: str) -> Task:
    """Find the task of that name: registered, or in a shipped YAML file.

    Raises:
        ConfigError: No such task; the message suggests close names.
    """
    from vispress.bench.tasks.yaml_task import shipped_task, shipped_tasks

    tasks = all_tasks()
    task = tasks.get(name) or shipped_task(name)
    if task is None:
        raise ConfigError(f"unknown task {name!r}; {suggest(name, [*tasks, *shipped_tasks()])}")
    return task


def _drawer(kind: "QuestionKind") -> Callable[[int, int], list[Prompt]]:
    def draw(n: int, seed: int) -> list[Prompt]:
        from vispress.reference import heldout

        return [
            Prompt((image,), prompt, answer, (question.patches,))
            for image, prompt, answer, question in heldout(kind, n, seed)
        ]

    return draw


def _episode_drawer(kind: "EpisodeKind") -> Callable[[int, int], list[Prompt]]:
    def draw(n: int, seed: int) -> list[Prompt]:
        from PIL import Image

        from vispress.reference.evaluation.episode_sets import held_out_episodes

        return [
            Prompt(
                tuple(Image.fromarray(pixels) for pixels in episode.images),
                episode.prompt,
                episode.answer,
                episode.evidence,
                episode.followups,
            )
            for episode in held_out_episodes(kind, n, seed=seed)
        ]

    return draw


def _large_drawer(kind: "LargeKind") -> Callable[[int, int], list[Prompt]]:
    def draw(n: int, seed: int) -> list[Prompt]:
        from vispress.reference.evaluation.large_sets import held_out_large

        return [
            Prompt((x.image,), x.question.prompt, x.question.answer, (x.question.patches,))
            for x in held_out_large(kind, n, seed=seed)
        ]

    return draw


def _clip_drawer(kind: "ClipKind") -> Callable[[int, int], list[Prompt]]:
    def draw(n: int, seed: int) -> list[Prompt]:
        from vispress.reference.evaluation.clip_sets import held_out_clips

        return [
            Prompt((), q.prompt, q.answer, (q.evidence,), videos=(q.frames,))
            for q in held_out_clips(kind, n, seed=seed)
        ]

    return draw
