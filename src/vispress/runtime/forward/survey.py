"""Keep what prompts of one layout have in common, so that the next of them costs next to nothing.

Places of images, counts, prompts, buckets and the rows that are to be read follow from token ids,
masks, labels and sizes alone (see `layout`). Made anew at every prefill they are most of what a
method pays before it does anything: small operations, each of them a call from Python.
"""

from collections.abc import Hashable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vispress.adapters.base import Modality
from vispress.runtime.encoder.capture import EncoderCapture
from vispress.runtime.forward.attention_reads import AttentionRead
from vispress.runtime.forward.model_call import ModelCall
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.layout import Document, Prompt, PromptEnds, PromptLayout
from vispress.runtime.plan.plan import Plan
from vispress.runtime.tokens.images import Bucket, Image


@dataclass(frozen=True, eq=False)
class Survey:
    """What is known of a prompt ahead of any value that a model computes.

    Args:
        layout: What the prompt is.
        asking: `[B, Q]` bool on the host, tokens that are neither padding nor answers.
        images: Without what belongs to one call.
        buckets: Of these images, and the number of each of theirs.
        reads: Attention rows to read, likewise; images in them are numbers.
        texts: `[T]` positions of the text of prompts, on the device.
    """

    layout: PromptLayout
    asking: Tensor
    images: tuple[Image, ...]
    buckets: tuple[tuple[Bucket, tuple[int, ...]], ...]
    reads: tuple[tuple[AttentionRead, Any, Any], ...]
    texts: Mapping[Prompt, Tensor]

    @classmethod
    def of(cls, state: ForwardState, texts: Mapping[Prompt, Tensor]) -> "Survey":
        """Take it from a call that was set up, before anything ran."""
        assert state.layout is not None
        assert state.asking is not None
        numbers = {image: number for number, image in enumerate(state.images)}
        images = tuple(_bare(image) for image in state.images)
        buckets = tuple(
            (replace(bucket, images=[]), tuple(numbers[image] for image in bucket.images))
            for bucket in state.buckets
        )
        return cls(
            state.layout,
            state.asking,
            images,
            buckets,
            tuple(_numbered(read, numbers) for read in state.reads),
            texts,
        )

    def begin(self, state: ForwardState, captures: Mapping[Modality, EncoderCapture]) -> None:
        """Set up another call with a prompt of this layout."""
        images = [copy(image) for image in self.images]
        for image in images:
            image.capture, image.trace = captures[image.modality], []
        state.layout, state.asking, state.images = self.layout, self.asking, images
        state.buckets = [
            replace(bucket, images=[images[one] for one in group], entered={}, memory={})
            for bucket, group in self.buckets
        ]
        state.reads = [_for_call(*parts, images) for parts in self.reads]


def _bare(image: Image) -> Image:
    """An image without what belongs to one call."""
    bare = copy(image)
    del bare.capture
    bare.trace, bare.paired_text = [], None
    return bare


def _numbered(read: AttentionRead, numbers: Mapping[Image, int]) -> tuple[AttentionRead, Any, Any]:
    tails = {numbers[image]: places for image, places in read.tails.items()}
    if read.groups is None:
        return replace(read, tails={}), tails, None
    marks, of_image = read.groups
    groups = marks, {numbers[image]: group for image, group in of_image.items()}
    return replace(read, tails={}, groups=None), tails, groups


def _for_call(
    read: AttentionRead, tails: Mapping[int, Any], groups: Any, images: Sequence[Image]
) -> AttentionRead:
    fresh = copy(read)
    fresh.tails = {images[number]: places for number, places in tails.items()}
    if groups is not None:
        fresh.groups = groups[0], {images[number]: group for number, group in groups[1].items()}
    return fresh


def layout_key(
    plan: Plan,
    state: ForwardState,
    call: ModelCall,
    captures: Sequence[EncoderCapture],
    embeds: Tensor,
    documents: Sequence[Document],
    ends: PromptEnds,
) -> Hashable | None:
    """Give a key that calls of one layout share, and no others; None where ids are not given.

    Args:
        plan: What is asked of the model; keys of several plans do not meet.
        state: The call.
        call: What the base model was called with.
        captures: What its vision encoder gave.
        embeds: `[B, Q, D]`, input embeddings.
        documents: Of the chunk.
        ends: Where prompts end.
    """
    ids = call.arguments.get("input_ids")
    if not plan.caches_layouts or not isinstance(ids, Tensor):
        return None
    host = call.on_host(ids).numpy()  # NumPy's: not a tensor operation each
    return (
        torch.is_inference_mode_enabled(),  # whose tensors are of no use to a backward
        embeds.shape[:2],
        embeds.device,
        tuple((host == token).tobytes() for token in plan.placeholders.values()),
        _bytes(state.host_valid),
        tuple(documents),
        _bytes(ends.supervised),
        None if ends.lengths is None else tuple(ends.lengths),
        tuple(_geometry(capture) for capture in captures),
    )


def _geometry(capture: EncoderCapture) -> Hashable:
    """Sizes of the images of an encoder call, and how their tokens lie."""
    crops = tuple(None if crops is None else crops.key() for _, crops in capture.layouts)
    return capture.modality, capture.counts, tuple(grid for grid, _ in capture.layouts), crops


def _bytes(mask: Tensor | None) -> bytes | None:
    return None if mask is None else mask.numpy().tobytes()


def is_true_throughout(mask: Tensor) -> bool:
    """Whether a mask hides nothing; of one on the host, without a tensor operation."""
    if mask.device.type == "cpu":
        return bool(mask.numpy().all())
    return bool(torch.all(mask))
