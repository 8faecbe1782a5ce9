"""Gather what surrounds an image in its prompt: paired text, the query, earlier images."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vispress.context import Context
from vispress.devices import sent
from vispress.methods.base import upcast
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.layout import Prompt
from vispress.runtime.tokens.images import Bucket, Image
from vispress.runtime.tokens.live_tokens import LiveTokens


def note_prompt_context(images: Sequence[Image], embeds: Tensor) -> None:
    """Note which image of each prompt is the last, and the mean of the text paired with each.

    Args:
        images: In the order of samples and positions.
        embeds: `[B, Q, D]`, input embeddings.
    """
    for i, (image, places) in enumerate(zip(images, pair_texts(images), strict=True)):
        image.last = not _followed(images, i)
        own = upcast(embeds.detach()[image.sample, sent(places, embeds.device)])
        image.paired_text = own.sum(dim=0) / max(1, len(places))


def _followed(images: Sequence[Image], i: int) -> bool:
    """Whether another image of its document stands behind an image and before its prompt's end."""
    if i + 1 == len(images):
        return False
    image, other = images[i], images[i + 1]
    same = other.prompt.document == image.prompt.document
    # nothing asks about an image without a prompt: all of its document is around it
    return same and (not image.prompt.ends or int(other.positions[0]) < image.prompt.stop)


def pair_texts(images: Sequence[Image]) -> list[Tensor]:
    """Positions of the text that belongs to each image, as `Context.paired_text` says."""
    pairs: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(images)
    for i in reversed(range(len(images))):
        image, followed = images[i], _followed(images, i)
        end = int(image.positions[-1])
        until = int(images[i + 1].positions[0]) if followed else image.prompt.stop
        pairs[i] = _between(image.text, end + 1, until)
        if not len(pairs[i]) and followed:
            pairs[i] = pairs[i + 1]
        elif not len(pairs[i]):
            behind = i > 0 and images[i - 1].prompt.document == image.prompt.document
            start = int(images[i - 1].positions[-1]) + 1 if behind else image.prompt.start
            pairs[i] = _between(image.text, start, int(image.positions[0]))
    return pairs


def _between(text: Tensor, start: int, end: int) -> Tensor:
    """Positions `[T]` of text in `[start, end)`."""
    return text[(text >= start) & (text < end)]


def context_of(
    state: ForwardState, bucket: Bucket, rows: LiveTokens, hidden: Tensor, *, inside: bool
) -> Context:
    """The surroundings of a bucket's images.

    Args:
        state: The call; its buckets are as they enter the placement.
        bucket: Whose images.
        rows: Rows that enter the placement's layer.
        hidden: `[B, P, D]`, their hidden states.
        inside: Whether the placement is inside the LLM.
    """
    texts = [image.paired_text for image in bucket.images if image.paired_text is not None]
    paired = torch.stack(texts).to(hidden.device)
    if not inside:
        return Context(paired_text=paired)
    prompts = dict.fromkeys(image.prompt for image in state.shown_images)
    groups = {prompt: i for i, prompt in enumerate(prompts)}
    chosen = _chosen(state, groups, rows.length, hidden.device)
    means = _means(chosen, [prompt.row for prompt in groups], rows, hidden)
    numbers = torch.tensor([groups[image.prompt] for image in bucket.images])
    query, earlier = means[:, sent(numbers, hidden.device)]
    return Context(paired_text=paired, query=query, earlier=earlier)


def _chosen(
    state: ForwardState, groups: Mapping[Prompt, int], length: int, device: torch.device
) -> Tensor:
    """`[2, G, Q]` bool: of each prompt, its query, and the images before its last one.

    Where no image is left before the last, the text behind that one stands for them.
    """
    images = state.shown_images
    parts = [(bucket, *_parts(images, bucket, groups)) for bucket in state.buckets]
    led = {  # prompts with something left of images before the last
        group for bucket, _, (_, earlier) in parts if bucket.num_visual for group in earlier
    }
    text = torch.zeros(2, len(groups), length, dtype=torch.bool)
    for image in (image for image in images if image.last):
        group = groups[image.prompt]
        text[0, group, image.text_after] = True
        text[1, group, image.text_after] = group not in led
    chosen = sent(text, device)
    true = torch.ones((), dtype=torch.bool, device=device)  # True itself would wait
    for bucket, rows, numbers in parts:
        positions = bucket.to(device).positions
        for part in range(2):
            if not rows[part]:
                continue
            every = rows[part] == list(range(len(positions)))
            tokens = positions if every else positions[sent(torch.tensor(rows[part]), device)]
            prompts = sent(torch.tensor(numbers[part]), device)
            chosen[part, prompts[:, None], tokens] = true
    return chosen


def _parts(
    images: Sequence[Image], bucket: Bucket, groups: Mapping[Prompt, int]
) -> tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]]:
    """Rows of a bucket that are a prompt's last image, and those before it; their prompts."""
    rows: tuple[list[int], list[int]] = ([], [])
    numbers: tuple[list[int], list[int]] = ([], [])
    for row, image in enumerate(bucket.images):
        for prompt, group in groups.items():
            if prompt.document == image.prompt.document and _inside(image, prompt):
                part = int(not _last_of(images, image, prompt))
                rows[part].append(row)
                numbers[part].append(group)
    return rows, numbers


def _inside(image: Image, prompt: Prompt) -> bool:
    return image.prompt == prompt or int(image.positions[-1]) < prompt.stop


def _last_of(images: Sequence[Image], image: Image, prompt: Prompt) -> bool:
    """Whether an image is the last one of a prompt."""
    inside = [i for i in images if i.prompt.document == prompt.document and _inside(i, prompt)]
    return inside[-1] is image


def _means(chosen: Tensor, samples: list[int], rows: LiveTokens, hidden: Tensor) -> Tensor:
    """`[M, G, D]`: mean hidden state of chosen logical positions `[M, G, Q]`; 0 for none.

    Group by group, so that one batch row at a time is widened.

    Args:
        chosen: Bool.
        samples: The batch row of each group.
        rows: Live tokens of the hidden states.
        hidden: `[B, P, D]`.
    """
    index, valid = rows.index, rows.valid
    if samples != list(range(len(hidden))):
        batch = sent(torch.tensor(samples), hidden.device)
        index, valid = index[batch], None if valid is None else valid[batch]
    weight = chosen.gather(2, index.expand(len(chosen), -1, -1))
    if valid is not None:
        weight = weight & valid
    sums = []
    for sample, weights in zip(samples, weight.unbind(1), strict=True):
        wide = upcast(hidden[sample])
        sums += [(wide * w[:, None]).sum(dim=0) for w in weights]
    means = torch.stack(sums).view(len(samples), len(chosen), -1).transpose(0, 1)
    return means / weight.sum(dim=2, keepdim=True).clamp(min=1)
