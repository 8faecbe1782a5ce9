"""Choose among the visual tokens of one encoder call, and cut them, between encoder and LLM."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from vispress.adapters.base import Modality
from vispress.errors import ConfigError
from vispress.integrations.vllm.signals import Watch, take_projector
from vispress.integrations.vllm.spec import Layout, Spec
from vispress.kinds import Signal
from vispress.methods.base import Compressor
from vispress.precision import full_precision
from vispress.runtime.encoder.capture import EncoderCapture, EncoderSink, projector_function
from vispress.runtime.forward.encoder_signals import encoder_signals
from vispress.types import TokenPlan, VisualTokens, full_index
from vispress_kernels.merge_tokens import merge_tokens

TEXT: Final = "vispress_text"
"""Argument of an encoder call, with `_image` or `_video` behind it: `[1 + T]` for each item, how
many text tokens stand behind it, and the ids of all of the prompt's."""


def modality_of(call: Mapping[str, Any]) -> Modality:
    """Tell what an encoder call of vLLM's is about: it never mixes images and videos."""
    return "video" if "pixel_values_videos" in call else "image"


def as_tiles(call: Mapping[str, Any]) -> dict[str, Any]:
    """Name frames of InternVL's videos as its pictures' tiles, which they are to the encoder."""
    names = {
        "pixel_values_videos": "pixel_values",
        "video_num_patches": "image_num_patches",
        "video_token_id": "image_token_id",
    }
    return {names.get(name, name): value for name, value in call.items()}


@dataclass(frozen=True, eq=False)
class Shown:
    """An image or video of an encoder call.

    Args:
        capture: What the call showed.
        number: Place in it.
        features: `[N, D + E]`, its tokens, and what else vLLM has beside each (DeepStack).
        layout: Its grid or crops.
        text: `[T]` ids of the prompt's text; None where it is not read.
        after: How many of them stand behind it.
    """

    capture: EncoderCapture
    number: int
    features: Tensor
    layout: Layout
    text: Tensor | None
    after: int

    @property
    def num_visual(self) -> int:
        """Tokens at the start."""
        return len(self.features)

    def likeness(self) -> tuple[object, ...]:
        """Name what items of one batch have in common."""
        grid, crops = self.layout
        parts = () if crops is None else (crops.segment, crops.row, crops.col)
        places = tuple(tuple(part.tolist()) for part in parts)
        text = None if self.text is None else len(self.text)
        return self.num_visual, grid, places, text, self.after


class Press:
    """A compressor at work in an engine's model.

    Args:
        spec: What is asked.
        watch: Shows the encoder.
        embed_text: Embeds `[T]` token ids as the LLM does.
    """

    def __init__(self, spec: Spec, watch: Watch, embed_text: Callable[[Tensor], Tensor]) -> None:
        self.spec, self._watch, self._embed_text = spec, watch, embed_text
        self._width = int(spec.adapter.language_model.config.hidden_size)

    def weights_loaded(self, projector: nn.Module) -> None:
        """Take what is read of the model's weights, as soon as they are there."""
        if Signal.PROJECTOR in self.spec.method.signals():
            take_projector(self.spec.adapter, projector)

    @torch.no_grad()
    def embed(
        self, encode: Callable[..., Any], call: Mapping[str, Any]
    ) -> list[tuple[Tensor, Tensor]]:
        """Run the encoder and keep what the method keeps of each image or video.

        Args:
            encode: vLLM's `embed_multimodal`.
            call: Its arguments; all items are of one modality.

        Returns:
            Of each item `[K, D + E]` values and `[K]` raster indices.
        """
        modality, spec = modality_of(call), self.spec
        plain = {name: value for name, value in call.items() if not name.startswith(TEXT)}
        with self._watch.watching() as sink:
            features = list(encode(**plain))
        if not features:
            return []
        self._see_padding(sink, plain)
        owners, parts = [], []
        for item, own in enumerate(features):
            count = spec.parts(modality, len(own))
            owners += [item] * count
            parts += own.chunk(count)
        main = [part[:, : self._width] for part in parts]
        capture = EncoderCapture(spec.adapter, modality, main, plain, sink)
        texts = call.get(f"{TEXT}_{modality}")
        groups: dict[tuple[object, ...], list[Shown]] = {}
        for number, (item, part) in enumerate(zip(owners, parts, strict=True)):
            after, text = 0, None
            if texts is not None:
                after, text = int(texts[item][0]), texts[item][1:]
            one = Shown(capture, number, part, capture.layouts[number], text, after)
            groups.setdefault(one.likeness(), []).append(one)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for group in groups.values():
            values, keep = self.cut(group, modality)
            found |= {one.number: (values[i], keep[i]) for i, one in enumerate(group)}
        return _joined(found, owners, [len(part) for part in parts])

    def cut(self, group: Sequence[Shown], modality: Modality) -> tuple[Tensor, Tensor]:
        """Keep what the method keeps of items of one shape.

        Args:
            group: The items.
            modality: Theirs.

        Returns:
            `[B, K, D + E]` values and `[B, K]` raster indices.
        """
        whole = torch.stack([one.features for one in group])
        batch, num_visual, _ = whole.shape
        index = full_index(batch, num_visual, whole.device)
        if self.spec.passes(modality, num_visual):
            return whole, index
        features = whole[..., : self._width]
        count = self.spec.count(modality, num_visual, group[0].layout)
        method, asked = self.spec.method, self.spec.placement.budget.resolve(num_visual)
        with full_precision():
            tokens = self._tokens(method, features, group)
            plan = method.plan(tokens, asked)
            plan.check(tokens, count, exact=True)
            keep = plan.keep if isinstance(plan.keep, Tensor) else torch.stack(list(plan.keep))
            values = self._values(plan, keep, features, group)
        rest = _at(whole[..., self._width :], keep)
        return torch.cat([values.to(whole.dtype), rest], dim=-1), keep

    def _tokens(self, method: Compressor, features: Tensor, group: Sequence[Shown]) -> VisualTokens:
        """The items as a method sees them."""
        parts, first = method.views(), group[0]
        reads = frozenset[Signal]() if parts else method.signals()
        batch, num_visual, _ = features.shape
        index = full_index(batch, num_visual, features.device)
        signals = encoder_signals(self.spec.plan, method, group, index, reads)
        if Signal.TEXT_EMBEDDINGS in reads:
            signals["text_embeddings"] = torch.stack([self._words(one) for one in group])
            signals["text_after"] = first.after
        if Signal.INPUT_EMBEDDINGS in reads:
            signals["input_embeddings"] = features
        if Signal.DEPTH in reads:
            signals["depth"] = (0, self.spec.plan.num_layers)
        if method.trained:
            signals["module"] = self.spec.module(features.device)
        grid, crops = first.layout
        return VisualTokens(
            features=features,
            index=index,
            num_original=num_visual,
            num_entered=num_visual,
            grid=grid,
            crops=crops,
            views=tuple(self._tokens(one, features, group) for one in parts),
            backend=self.spec.plan.backend,
            **signals,
        )

    def _words(self, one: Shown) -> Tensor:
        if one.text is None:
            raise ConfigError(
                f"{self.spec.method.name} reads the prompt, which came without its text: another "
                "processor than vispress's made the request"
            )
        return self._embed_text(one.text.to(one.features.device))

    def _values(
        self, plan: TokenPlan, keep: Tensor, features: Tensor, group: Sequence[Shown]
    ) -> Tensor:
        """`[B, K, D]`: kept tokens, merged ones, or what the method puts in their place."""
        if plan.features is not None:
            return plan.features
        if plan.assign is None or plan.weight is None:
            return _at(features, keep)
        slots, backend = keep.shape[1], self.spec.plan.backend
        fold = partial(merge_tokens, weight=plan.weight, backend=backend)
        if plan.merge_on == "features":
            return fold(features, plan.assign, slots)
        inputs = torch.stack([one.capture.vision_features(one.number) for one in group])
        merged = projector_function(self.spec.adapter)(fold(inputs, plan.assign, slots))
        # a slot of one token keeps it as it is: newline tokens never went through the projector
        members = torch.stack([(plan.assign == slot).sum(1) for slot in range(slots)], dim=1)
        return torch.where((members > 1).unsqueeze(-1), merged, _at(features, keep))

    def _see_padding(self, sink: EncoderSink, call: Mapping[str, Any]) -> None:
        adapter = self.spec.adapter
        if Signal.PADDING in self.spec.plan.encoder_signals and adapter.square_encoder():
            sink.padding = adapter.padding(call["pixel_values"])


def _joined(
    found: Mapping[int, tuple[Tensor, Tensor]], owners: Sequence[int], sizes: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Rows and raster indices of each item, from those of its parts."""
    values: dict[int, list[Tensor]] = {}
    kept: dict[int, list[Tensor]] = {}
    before: dict[int, int] = {}
    for number, item in enumerate(owners):
        rows, keep = found[number]
        values.setdefault(item, []).append(rows)
        kept.setdefault(item, []).append(keep + before.get(item, 0))
        before[item] = before.get(item, 0) + sizes[number]
    return [(torch.cat(values[item]), torch.cat(kept[item])) for item in values]


def _at(values: Tensor, keep: Tensor) -> Tensor:
    """Rows of `[B, N, D]` at `[B, K]`."""
    return values.gather(1, keep.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
