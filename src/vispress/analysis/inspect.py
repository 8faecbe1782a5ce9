"""One question through one model, uncompressed and under several methods."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vispress.analysis.sources import SCENE, check_source
from vispress.api import compress_model, compression_report, remove_compression
from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.tasks.task import Prompt, get_task
from vispress.errors import ConfigError, UnsupportedModelError
from vispress.methods.base import Compressor
from vispress.picture_files import open_picture
from vispress.report import ImageReport
from vispress.types import Positions

_MAX_NEW_TOKENS = 4


@dataclass(frozen=True)
class View:
    """What one method kept of the picture, and what the model then said.

    Args:
        title: The method with its budget; `"uncompressed"` for the model as it is.
        answer: The model's words.
        image: What was kept, None for the uncompressed model.
        mean_keep_ratio: Kept share of visual tokens as a mean over decoder layers.
        notes: Remarks of the report.
    """

    title: str
    answer: str
    image: ImageReport | None
    mean_keep_ratio: float
    notes: tuple[str, ...] = ()


def open_prompt(source: str, question: str | None) -> Prompt:
    """The picture and question that a user named.

    Args:
        source: An image file, or `scene:SEED` for a held-out scene.
        question: In the reference model's words; scenes bring their own. For a scene it may also be
            the name of a task.

    Raises:
        ConfigError: The file is refused by `open_picture`, the seed is no number, or a file comes
            without a question.
    """
    check_source(source, question)
    if source.startswith(SCENE):
        return _scene(int(source.removeprefix(SCENE)), question)
    image = open_picture(Path(source), source)
    return Prompt((image,), _asked(question or ""), "")


def _scene(seed: int, question: str | None) -> Prompt:
    known = question is None or " " not in question
    prompt = get_task(question or "attribute" if known else "attribute").draw(1, seed)[0]
    if prompt.videos:
        raise ConfigError(f"{question!r} shows a video; name a task that shows pictures")
    return prompt if known else Prompt(prompt.images, _asked(question or ""), "")


def _asked(question: str) -> str:
    """A question as the reference model was taught: `<image> words ? :`."""
    words = question.replace("<image>", " ").replace("?", " ? ").replace(":", " : ").split()
    words = [word.lower() for word in words]
    if words[-1:] != [":"]:
        words += [":"] if words[-1:] == ["?"] else ["?", ":"]
    return " ".join(["<image>", *words])


def unknown_words(loaded: LoadedModel, prompt: Prompt) -> list[str]:
    """Words of the question that the model's tokenizer does not know."""
    tokenizer = loaded.processor.tokenizer
    unknown = tokenizer.unk_token_id
    words = prompt.text.split()
    return [w for w in words if unknown in tokenizer(w, add_special_tokens=False)["input_ids"]]


def inspect(
    loaded: LoadedModel, prompt: Prompt, methods: Sequence[Compressor], positions: Positions | None
) -> list[View]:
    """Answers and kept tokens: the uncompressed model first, then every method.

    Raises:
        BudgetError: A method has no budget.
        UnsupportedMethodError: A method does not work on this model.
        UnsupportedModelError: The picture is composed of crops, which cannot be drawn yet.
    """
    views = [View("uncompressed", _say(loaded, prompt), None, 1.0)]
    for method in methods:
        compress_model(loaded.model, method, positions=positions)
        try:
            answer = _say(loaded, prompt)
            report = compression_report(loaded.model)
        finally:
            remove_compression(loaded.model)
        image = report.samples[0].images[0]
        if image.grid is None:
            raise UnsupportedModelError("pictures of AnyRes crops and tiles are not supported")
        title = f"{method.name} ({'merges' if method.merges else 'prunes'})"
        views.append(View(title, answer, image, report.mean_keep_ratio, report.notes))
    return views


def _say(loaded: LoadedModel, prompt: Prompt) -> str:
    return loaded.answer([prompt], _MAX_NEW_TOKENS)[0]
