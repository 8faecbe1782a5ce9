"""How methods are trained by `vispress train-compressor`: a lesson for each method and stage.

A file of this package that trains something names its lessons in `LESSONS` and is found by that;
code elsewhere adds its own by `add_lesson`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from torch import nn

from vispress import distillation
from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.tasks.task import Prompt
from vispress.checks import check_choice
from vispress.distillation.unfinished import Unfinished
from vispress.errors import ConfigError
from vispress.methods.base import Compressor
from vispress.weights import read_saved

if TYPE_CHECKING:
    from vispress.distillation.distil import Curve

Advance = Callable[[int], None]
"""Told by how much a bar moves on."""


def _silent(what: str, total: int) -> Advance:
    return lambda _: None


@dataclass(frozen=True, eq=False)
class Pupil:
    """A model, the method whose parameters are trained on it, and what with.

    Args:
        loaded: The model, uncompressed.
        method: As it will be saved.
        prompts: What is shown to the model, in order.
        steps: Of the optimiser.
        lr: Highest learning rate.
        batch_size: Prompts that go through the model at once.
        seed: Of the order.
        samples: Prompts, at most, for bars.
        start_from: A folder with the parameters that training begins with; None for fresh ones.
        unfinished: Where a stopped training goes on from.
        begin: Begins a bar, from its name and length.
    """

    loaded: LoadedModel
    method: Compressor
    prompts: Iterable[Prompt]
    steps: int
    lr: float
    batch_size: int = 8
    seed: int = 0
    samples: int = 0
    start_from: Path | None = None
    unfinished: Unfinished = field(default_factory=Unfinished)
    begin: Callable[[str, int], Advance] = field(default=_silent)

    def compress(self) -> nn.Module:
        """Compress the model by the method, and give the method's parameters.

        Raises:
            ConfigError: Those that it is to start from do not fit.
        """
        from vispress import compress_model, remove_compression
        from vispress.adapters.base import find_adapter
        from vispress.runtime.modules import MODULES, held

        compress_model(self.loaded.model, self.method)
        base = find_adapter(self.loaded.model).base
        if self.start_from is not None:
            try:
                read_saved(self.start_from).load_into(held(base))
            except ConfigError:
                remove_compression(self.loaded.model)
                raise
        module: nn.Module = getattr(base, MODULES).get_submodule("0")
        return module


@dataclass(frozen=True, eq=False)
class Lesson:
    """One way in which a method is trained.

    Args:
        method: Its name.
        stage: What the way is called.
        teach: Trains; the model stays compressed by the method.
        measure: What the curve holds, in words.
        samples: Prompts, by default.
        steps: Of the optimiser, by default.
        lr: Highest learning rate, by default.
        order: Place among the stages of a method, whose first one is the default.
        several: Whether prompts may show several pictures where scenes are drawn.
    """

    method: str
    stage: str
    teach: Callable[[Pupil], "Curve"]
    measure: str
    samples: int = 4000
    steps: int = 400
    lr: float = 2e-3
    order: int = 0
    several: bool = False


_ADDED: list[Lesson] = []


def add_lesson(lesson: Lesson) -> Lesson:
    """Make a lesson known.

    Raises:
        ConfigError: The method has one of that name.
    """
    if any((one.method, one.stage) == (lesson.method, lesson.stage) for one in all_lessons()):
        raise ConfigError(f"{lesson.method} has a stage {lesson.stage!r} of training already")
    _ADDED.append(lesson)
    return lesson


def all_lessons() -> tuple[Lesson, ...]:
    """List what is known: a method's in their order, the built-in ones first."""
    return tuple(sorted((*_built_in(), *_ADDED), key=lambda lesson: lesson.order))


@cache
def _built_in() -> tuple[Lesson, ...]:
    names = (module.name for module in iter_modules(distillation.__path__))
    modules: list[Any] = [import_module(f"{distillation.__name__}.{name}") for name in names]
    return tuple(lesson for module in modules for lesson in getattr(module, "LESSONS", ()))


def find_lesson(method: str, stage: str | None = None) -> Lesson:
    """Find how a method is trained.

    Args:
        method: Its name.
        stage: Of its training; None for the first one.

    Raises:
        ConfigError: The method is not trained by any lesson, or has no such stage.
    """
    known = all_lessons()
    check_choice("method", method, sorted({one.method for one in known}))
    own = [one for one in known if one.method == method]
    if stage is None:
        return own[0]
    check_choice("stage", stage, tuple(one.stage for one in own))
    return next(one for one in own if one.stage == stage)
