"""The oracle of the decode stage: what deeper layers see at each step, decided in plain Python.

For the untouched model inside `masked_model`: one layer's attention is worked out beside its own,
and the masks of the layers behind it change from row to row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from tests.laws.oracle import language_model
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vispress.report import CompressionReport

NAME = "oracle_noting"


class Stepping:
    """DyCoke's rule, one sample and one token after the other.

    Args:
        layer: Decoder layer that is read.
        places: Positions of the visual tokens of each sample.
        keep: How many of them are chosen.
        similarity: Cosine from which a choice stays.
        quirks: A step that stays sees everything.
    """

    def __init__(
        self, layer: int, places: list[list[int]], keep: list[int], similarity: float, quirks: bool
    ) -> None:
        self.layer, self.keep, self.similarity, self.quirks = layer, keep, similarity, quirks
        self.places, self.stays = places, 0
        self.last: list[Tensor | None] = []
        self.chosen: list[set[int]] = []
        self.prefill, self.hidden = True, torch.empty(0)
        self.changes = 0

    def start(self, batch: int, past: int) -> None:
        """A call begins."""
        self.prefill = past == 0
        if self.prefill:
            self.last, self.chosen = [None] * batch, [set() for _ in range(batch)]
            self.times = batch // len(self.places)

    def reorder(self, index: Tensor) -> None:
        """Beams were reordered."""
        order = index.tolist()
        self.last, self.chosen = [self.last[i] for i in order], [self.chosen[i] for i in order]

    def note(self, weights: Tensor) -> None:
        """Decide for a call's rows: `[B, H, Q, S]` attention of the layer that is read."""
        if self.prefill:
            return
        B, _, Q, S = weights.shape
        self.hidden = torch.zeros(B, Q, S, dtype=torch.bool)
        for b in range(B):
            places = self.places[b // self.times]
            for t in range(Q):
                seen = self._step(b, weights[b, :, t].mean(0)[places])
                for i, place in enumerate(places):
                    self.hidden[b, t, place] = i not in seen

    def _step(self, b: int, attention: Tensor) -> set[int]:
        last, self.last[b] = self.last[b], attention
        if last is not None:
            cosine = float(attention @ last / (attention.norm() * last.norm()))
            if cosine >= self.similarity:
                self.stays += 1
                return set(range(len(attention))) if self.quirks else self.chosen[b]
        order = sorted(range(len(attention)), key=lambda i: (-float(attention[i]), i))
        fresh = set(order[: self.keep[b // self.times]])
        self.changes += last is not None and fresh != self.chosen[b]
        self.chosen[b] = fresh
        return fresh

    def narrow(self, index: int, allow: Tensor) -> Tensor:
        """The mask `[B, 1, Q, S]` of layer `index` without what is hidden from it."""
        if self.prefill or index <= self.layer:
            return allow
        return allow & ~self.hidden[:, None]


def stepping(model: Any, method: Any, report: CompressionReport) -> Stepping | None:
    """The oracle for a method and what a prefill of it kept; None without a decode stage."""
    selector = method.cached_selector()
    placement = selector and selector.decode_placement(report.num_layers)
    if placement is None:
        return None
    alive = report.alive(placement.layer - 1)
    places: list[list[int]] = []
    keep: list[int] = []
    for b, sample in enumerate(report.samples):
        videos = [image for image in sample.images if image.modality == "video"]
        own = [[p for p in video.positions if alive[b, p]] for video in videos]
        places.append([p for one in own for p in one])
        share = 1 - selector.decode_pruned
        keep.append(sum(max(1, int(len(one) * share)) if share else 0 for one in own))
    return Stepping(
        placement.layer - 1, places, keep, selector.similarity, selector.reference_quirks
    )


@contextmanager
def noting_attention(model: Any, steps: Stepping | None) -> Iterator[None]:
    """Inside, `steps` is told the attention of its layer, and of reordered beams."""
    if steps is None:
        yield
        return
    module = language_model(model).layers[steps.layer].self_attn
    config, reorder = module.config, Cache.reorder_cache

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **rest: Any
    ) -> Any:
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        logits = (q @ keys.transpose(2, 3) * scaling).masked_fill(~mask, float("-inf"))
        steps.note(logits.softmax(-1))
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **rest)

    def reordered(self: Any, index: Tensor) -> None:
        steps.reorder(index)
        reorder(self, index)

    AttentionInterface.register(NAME, attend)
    module.config = copy(config)
    module.config._attn_implementation = NAME
    Cache.reorder_cache = reordered  # type: ignore[method-assign]
    try:
        yield
    finally:
        Cache.reorder_cache = reorder  # type: ignore[method-assign]
        module.config = config
        AttentionInterface._global_mapping.pop(NAME)
