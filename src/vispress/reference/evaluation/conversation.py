"""Exact match on held-out episodes, and conversations answered on a kept KV cache.

The token protocol of a conversation, which training matches exactly:

1. The first turn is an ordinary prompt: `<s>`, words and visual tokens up to `:`. The model answers
   with one word, the greedy choice after `:`.
2. Each later turn is fed on the kept cache as `[previous answer, words of the question, ":"]`:
   no `<s>`, and the end token never enters the context. The previous answer is the model's own
   word, right or wrong; `generate(max_new_tokens=1)` leaves it to be fed, as the cache ends at
   `:`. Positions go on without a gap.
3. In a batch the block of a later turn is padded on the left; padding is masked for good and does
   not count in the positions, so every sample gives what it gives alone.

A turn is right if its word is; a conversation is right if every turn is.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration, LlavaProcessor

from vispress.reference.evaluation.episode_sets import Episode, held_out_episodes
from vispress.reference.evaluation.evaluate import by_kind, share_right
from vispress.reference.model.llava import MAX_NEW_TOKENS
from vispress.reference.world.words import EPISODE_KINDS, EpisodeKind
from vispress.runtime.kv_cache.hf_compat import CACHE


@torch.inference_mode()
def episode_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    episodes: Iterable[Episode],
    *,
    batch: int = 32,
) -> list[str]:
    """Answer greedily with plain transformers, in left-padded batches.

    Args:
        model: The model.
        processor: Its processor.
        episodes: All of them conversations of equally many turns, or none.
        batch: Episodes at a time.

    Returns:
        The generated words, in order; the turns of a conversation are joined by `" / "`.
    """
    episodes = list(episodes)
    answers: list[str] = []
    for start in range(0, len(episodes), batch):
        part = episodes[start : start + batch]
        inputs = processor(
            images=[Image.fromarray(pixels) for e in part for pixels in e.images],
            text=[e.prompt for e in part],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device, model.dtype)
        if part[0].followups:
            later = [[text for text, _ in e.followups] for e in part]
            answers += _converse(model, processor, inputs, later)
            continue
        out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        answers += [a.strip() for a in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


def _converse(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    inputs: dict[str, Tensor],
    later: Sequence[Sequence[str]],
) -> list[str]:
    """Ask one word a turn, as the module says; `generate` skips what the cache holds."""
    cache = DynamicCache(config=model.config.get_text_config())
    asked: dict[str, Any] = dict(inputs)
    turns = []
    for turn in range(len(later[0]) + 1):
        ids = model.generate(**asked, **{CACHE: cache}, max_new_tokens=1, do_sample=False)
        turns.append(ids[:, -1])
        if turn == len(later[0]):
            break
        block = processor.tokenizer(
            [texts[turn] for texts in later],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(ids.device)
        mask = asked["attention_mask"]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1]), block["attention_mask"]], dim=1)
        asked = {"input_ids": torch.cat([ids, block["input_ids"]], dim=1), "attention_mask": mask}
    words = [processor.tokenizer.convert_ids_to_tokens(turn) for turn in turns]
    return [" / ".join(row) for row in zip(*words, strict=True)]


def episode_accuracy(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    *,
    n: int,
    seed: int = 0,
    kinds: Iterable[EpisodeKind] = EPISODE_KINDS,
) -> dict[str, float]:
    """Measure the share of exactly right episodes by kind, on `n` held-out episodes each."""

    def ask(kind: EpisodeKind) -> float:
        episodes = held_out_episodes(kind, n, seed=seed)
        answers = episode_answers(model, processor, episodes)
        return share_right(answers, [e.answer_text for e in episodes])

    return by_kind(model, kinds, ask)
