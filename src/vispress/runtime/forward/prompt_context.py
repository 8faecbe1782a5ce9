"""What surrounds an image in its prompt: the text paired with it, the query, earlier images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vispress.context import Context
from vispress.devices import sent
from vispress.methods.base import upcast
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.tokens.images import Bucket, Image
from vispress.runtime.tokens.live_tokens import LiveTokens


def note_prompt_context(images: Sequence[Image], text: Tensor, embeds: Tensor) -> None:
    """Note which image of each sample is the last, and the mean of the text paired with each.

    Args:
        images: In the order of samples and positions.
        text: `[B, Q]` bool on the host, valid text.
        embeds: `[B, Q, D]`, input embeddings.
    """
    for i, (image, places) in enumerate(zip(images, pair_texts(images, text), strict=True)):
        image.last = i + 1 == len(images) or images[i + 1].sample != image.sample
        own = upcast(embeds.detach()[image.sample, sent(places, embeds.device)])
        image.paired_text = own.sum(dim=0) / max(1, len(places))


def pair_texts(images: Sequence[Image], text: Tensor) -> list[Tensor]:
    """Positions of the text that belongs to each image, as `Context.paired_text` says."""
    ends = [int(image.positions[-1]) for image in images]
    starts = [int(image.positions[0]) for image in images]
    pairs: list[Tensor] = [text.new_empty(0, dtype=torch.int64)] * len(images)
    for i in reversed(range(len(images))):
        sample = images[i].sample
        followed = i + 1 < len(images) and images[i + 1].sample == sample
        until = starts[i + 1] if followed else text.shape[1]
        pairs[i] = _text_between(text[sample], ends[i] + 1, until)
        if not len(pairs[i]) and followed:
            pairs[i] = pairs[i + 1]
        elif not len(pairs[i]):
            behind = i > 0 and images[i - 1].sample == sample
            pairs[i] = _text_between(text[sample], ends[i - 1] + 1 if behind else 0, starts[i])
    return pairs


def _text_between(text: Tensor, start: int, end: int) -> Tensor:
    return text[start:end].nonzero()[:, 0] + start


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
    led = {  # samples with images before the last
        image.sample
        for each in state.buckets
        if each.num_visual and not each.images[0].last
        for image in each.images
    }
    text = torch.zeros(2, hidden.shape[0], rows.length, dtype=torch.bool)
    for image in (image for image in state.images if image.last):
        text[0, image.sample, image.text_after] = True
        text[1, image.sample, image.text_after] = image.sample not in led
    query_and_earlier = sent(text, hidden.device)
    true = torch.ones((), dtype=torch.bool, device=hidden.device)  # True itself would wait
    for other in (each.to(hidden.device) for each in state.buckets):
        target = query_and_earlier[0 if other.images[0].last else 1]
        target[other.sample[:, None], other.positions] = true
    query, earlier = _means(query_and_earlier, rows, hidden)[:, bucket.sample]
    return Context(paired_text=paired, query=query, earlier=earlier)


def _means(chosen: Tensor, rows: LiveTokens, hidden: Tensor) -> Tensor:
    """`[M, B, D]`: mean hidden state of chosen logical positions `[M, B, Q]`; 0 for none.

    Sample by sample, so that one sample at a time is widened.
    """
    weight = chosen.gather(2, rows.index.expand(len(chosen), -1, -1))
    if rows.valid is not None:
        weight = weight & rows.valid
    sums = []
    for own, weights in zip(hidden, weight.unbind(1), strict=True):
        wide = upcast(own)
        sums += [(wide * w[:, None]).sum(dim=0) for w in weights]
    means = torch.stack(sums).view(len(hidden), len(chosen), -1).transpose(0, 1)
    return means / weight.sum(dim=2, keepdim=True).clamp(min=1)
