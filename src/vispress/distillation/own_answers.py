"""Prompts with answers behind them: their own, or what the model says."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.tasks.task import Prompt
from vispress.distillation.lessons import Advance
from vispress.errors import ConfigError

IGNORED = -100
_TYPES = ("mm_token_type_ids", "token_type_ids")
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


def with_answers(loaded: LoadedModel, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Encode prompts with their answers behind them, and labels on answers and what ends them.

    Args:
        loaded: The model with its processor.
        prompts: A batch; of a conversation, the first turn.

    Returns:
        Keyword arguments of the model: prompts padded on the left, answers on the right.

    Raises:
        ConfigError: A prompt has no answer.
    """
    for prompt in prompts:
        if not prompt.answer:
            raise ConfigError(
                f"training by answers needs them, and {prompt.text!r} has none; give --data the "
                "name of a task, or 'answer' in each line of a .jsonl file"
            )
    inputs = dict(loaded.encode(prompts))
    tokenizer, device = loaded.processor.tokenizer, inputs["input_ids"].device
    answers = [
        [*tokenizer(prompt.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for prompt in prompts
    ]
    longest = max(map(len, answers))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.tensor([own + [pad] * (longest - len(own)) for own in answers], device=device)
    real = torch.arange(longest) < torch.tensor([[len(own)] for own in answers])
    real = real.to(device)
    inputs["labels"] = torch.cat(
        [torch.full_like(inputs["input_ids"], IGNORED), ids.masked_fill(~real, IGNORED)], dim=1
    )
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.cat([mask, real.to(mask)], dim=1)
    for name in _TYPES:
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(ids)], dim=1)
    return inputs
