"""What the LLM would show a method at a stage of a schedule, from recorded queries and keys."""

import torch


def attention_rows(queries, keys, alive):
    """Causal attention `[H, Q, L]` of the last Q positions over the rows that are left.

    Args:
        queries: `[H, Q, dh]`, of the last Q positions.
        keys: `[H, L0, dh]`, of all original positions.
        alive: `[L]`; positions that are left.
    """
    logits = queries @ keys[:, alive].mT / queries.shape[-1] ** 0.5
    Q, L = logits.shape[1:]
    future = torch.arange(L) > torch.arange(L - Q, L)[:, None]
    return logits.masked_fill(future, float("-inf")).softmax(dim=-1)


def image_part(case, alive):
    """Which of the rows that are left are visual tokens."""
    start = case["param/image_start"]
    return (alive >= start) & (alive < start + case["param/image_tokens"])


def sequence_length(case):
    """Positions of the uncompressed prompt."""
    return case["param/image_start"] + case["param/image_tokens"] + case["param/text_after"]


def drop(alive, image, keep):
    """The positions that are left when only `keep` of the visual tokens stay."""
    visual = torch.where(image)[0]
    stays = ~image
    stays[visual[keep]] = True
    return alive[stays]


def outputs(case, stage):
    """The official outputs of one stage: `outputs(case, 0)("score")`."""
    return lambda name: case[f"out/stage{stage}_{name}"]
