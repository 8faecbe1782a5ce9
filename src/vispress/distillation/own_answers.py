"""Prompts with what the model itself answers, as some lessons want them."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.tasks.task import Prompt
from vispress.distillation.lessons import Advance

LONGEST = 16
"""Tokens of an answer, at most."""


def answered(
    loaded: LoadedModel,
    prompts: Iterable[Prompt],
    *,
    right: bool,
    batch_size: int = 8,
    advance: Advance | None = None,
) -> Iterator[Prompt]:
    """Let a model answer prompts about one picture, and give them with its answers.

    Args:
        loaded: The model, uncompressed; it answers greedily.
        prompts: Those that show more than one picture, or none, are left out.
        right: Whether those are left out, too, whose answer is another than the prompt's; a prompt
            without an answer stays.
        batch_size: Prompts of a batch.
        advance: Told how many prompts were asked.
    """
    left = iter(prompts)
    while batch := list(islice(left, batch_size)):
        asked = [replace(one, followups=()) for one in batch if one.visuals == len(one.images) == 1]
        for one, said in zip(asked, loaded.answer(asked, LONGEST) if asked else [], strict=True):
            if said and not (right and one.answer and said != one.answer):
                yield replace(one, answer=said)
        if advance is not None:
            advance(len(batch))
