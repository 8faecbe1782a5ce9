"""DAMRO: contrast each step with what the model would say of the picture's outlier tokens alone.

Gong et al., "DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination",
EMNLP 2024, arXiv:2410.04514.
Source: the authors' code, read through a specification. No compression: decoding costs twice.
Follows the code: outliers are the k tokens with the largest [CLS] attention in the encoder layer
that gives the features, all heads as one of full width (`heads="mean"`: InstructBLIP's file); in
the negative branch they stand for the picture in the order of their score, with keys and values of
its own; AnyRes: those of the thumbnail and one newline token.
Differs: batches, several pictures, and processors that run before it (`generate` applies its own
first; the code replaces them). Beams are refused.
Reconstructed: `scores="column_mean"` for encoders without [CLS]; the first tile in place of a
thumbnail where there is none; negative positions count text and outliers on one axis, and early
encoder features (Qwen3-VL's) stay out of the negative branch.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor

from vispress.adapters.base import ModelAdapter, find_adapter
from vispress.checks import check_choice, check_integer, check_number
from vispress.errors import CompressionStateError, ConfigError, UnsupportedMethodError
from vispress.methods._parts.scoring.encoder_attention import Scores
from vispress.methods.base import descending
from vispress.runtime.encoder.capture import EncoderCapture, EncoderSink
from vispress.runtime.encoder.feature_choice import check_choice_of_features
from vispress.runtime.hooks.attention import watch, watching
from vispress.runtime.kv_cache.hf_compat import CACHE
from vispress.runtime.tokens.images import Located, locate_images
from vispress.types import Signal

Heads = Literal["one", "mean"]


def contrast(
    z: Float[Tensor, "B V"], negative: Float[Tensor, "B V"], alpha: float, beta: float
) -> Float[Tensor, "B V"]:
    """`(1 + alpha) z - alpha negative`; -inf where `z` is below its maximum by a factor `beta`."""
    low = z.amax(dim=-1, keepdim=True) + (math.log(beta) if beta else -math.inf)
    return ((1 + alpha) * z - alpha * negative).masked_fill(z < low, -math.inf)


class DAMRO(LogitsProcessor):
    """A logits processor for one `generate` after another on the same prompts.

    `model.generate(**inputs, logits_processor=LogitsProcessorList([DAMRO(model, inputs)]))`.
    Greedy or sampling, any `num_return_sequences`; the model may be compressed.

    Args:
        model: What will generate.
        inputs: The very arguments of `generate`: `input_ids`, `attention_mask` and pictures.
        num_outliers: Tokens that stand for a picture, at least 1 (published: 10; 4 InstructBLIP).
        alpha: Weight of the contrast, at least 0 (2 for LLaVA, 0.5 on POPE, 1.5 InstructBLIP's
            CHAIR).
        beta: Words less likely than this share of the likeliest are out of the question, in [0, 1].
        heads: `"one"` full-width head, or the `"mean"` over heads.
        scores: `"cls"`, or `"column_mean"` (mean attention received) for encoders without [CLS].

    Raises:
        ConfigError: A value is out of its range, or `inputs` lacks what is needed.
        UnsupportedMethodError: [CLS] attention is asked of an encoder without one.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        num_outliers: int = 10,
        alpha: float = 2.0,
        beta: float = 0.1,
        heads: Heads = "one",
        scores: Scores = "cls",
    ) -> None:
        check_integer("num_outliers", num_outliers, low=1)
        check_number("alpha", alpha, low=0.0)
        check_number("beta", beta, low=0.0, high=1.0)
        check_choice("heads", heads, get_args(Heads))
        check_choice("scores", scores, get_args(Scores))
        missing = [name for name in ("input_ids", "pixel_values") if inputs.get(name) is None]
        if missing or inputs.get("pixel_values_videos") is not None:
            found = f"without {' and '.join(missing)}" if missing else "with videos"
            raise ConfigError(f"DAMRO needs input_ids and pixel_values, no videos, got {found}")
        self.alpha, self.beta, self.num_outliers = alpha, beta, num_outliers
        self._model, self._adapter = model, find_adapter(model)
        if scores == "cls" and not self._adapter.has_cls:
            raise UnsupportedMethodError(
                f"DAMRO needs [CLS] attention, which {self._adapter.family} cannot give; "
                "the documented substitute is scores='column_mean'"
            )
        by_cls = Signal.CLS_WIDE_ATTENTION if heads == "one" else Signal.CLS_ATTENTION
        signal = by_cls if scores == "cls" else Signal.COLUMN_ATTENTION
        ids: Tensor = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        self._prompt = ids
        self._valid = torch.ones_like(ids) if mask is None else mask
        with torch.no_grad():
            capture, features = _encode(self._adapter, signal, inputs)
            self._embeds, self._mask = self._negative(capture, features, signal)
        self._seen: Tensor | None = None

    @torch.no_grad()
    def __call__(
        self, input_ids: Int[Tensor, "B L"], scores: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B V"]:
        """The contrasted logits of a step.

        Raises:
            CompressionStateError: The sequences are not those of the prompts, each one token longer
                than in the step before (beams change places).
        """
        hidden = self._start(input_ids) if self._starts(input_ids) else self._step(input_ids)
        self._seen = input_ids
        head = self._model.get_output_embeddings()  # type: ignore[operator]
        negative = head(hidden[:, -1]).to(scores)
        return contrast(scores, negative, self.alpha, self.beta)

    def _starts(self, ids: Tensor) -> bool:
        return ids.shape[1] == self._prompt.shape[1]

    def _start(self, ids: Tensor) -> Tensor:
        times, rest = divmod(len(ids), len(self._prompt))
        if rest or not torch.equal(ids, self._prompt.repeat_interleave(times, dim=0).to(ids)):
            raise CompressionStateError(
                "DAMRO was made for other prompts than those that are generated from; make one "
                "with the very inputs of generate"
            )
        self._cache = DynamicCache(config=self._adapter.language_model.config)
        self._alive = self._mask.repeat_interleave(times, dim=0)
        return self._run(self._embeds.repeat_interleave(times, dim=0))

    def _step(self, ids: Tensor) -> Tensor:
        if self._seen is None or not torch.equal(ids[:, :-1], self._seen):
            raise CompressionStateError(
                "DAMRO follows each sequence token by token: beam search, which exchanges them, "
                "and assisted decoding are not supported; use greedy decoding or sampling"
            )
        self._alive = torch.cat([self._alive, self._alive.new_ones(len(ids), 1)], dim=1)
        return self._run(self._model.get_input_embeddings()(ids[:, -1:]))  # type: ignore[operator]

    def _run(self, embeds: Tensor) -> Tensor:
        positions = (self._alive.cumsum(dim=1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        if self._adapter.mrope:
            positions = positions.expand(3, -1, -1)
        out = self._adapter.language_model(
            inputs_embeds=embeds,
            attention_mask=self._alive,
            position_ids=positions,
            use_cache=True,
            **{CACHE: self._cache},
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _negative(
        self, capture: EncoderCapture, features: tuple[Tensor, ...], signal: Signal
    ) -> tuple[Tensor, Tensor]:
        """Embeddings `[B, L', D]` and mask of prompts with outliers for pictures, padded left."""
        marks = (self._prompt == self._adapter.placeholders()["image"]).long().cpu()
        valid = self._valid.bool().cpu()
        images = locate_images(marks, [capture], {"image": 1})
        embeds = self._model.get_input_embeddings()(self._prompt)  # type: ignore[operator]
        layer = self._adapter.feature_layer()
        rows = []
        for b in range(len(embeds)):
            parts, start = [], 0
            for image in (image for image in images if image.sample == b):
                score = capture.attention(signal, (layer,), image.number).mean(dim=0)
                chosen = self._outliers(image, score)
                here = valid[b].clone()
                here[image.positions] = False
                here[:start], here[int(image.positions[0]) :] = False, False
                parts += [embeds[b, here], features[image.number][chosen].to(embeds)]
                start = int(image.positions[-1]) + 1
            here = valid[b].clone()
            here[:start] = False
            rows.append(torch.cat([*parts, embeds[b, here]]))
        width = max(map(len, rows))
        out, mask = embeds.new_zeros(len(rows), width, embeds.shape[-1]), []
        for b, row in enumerate(rows):
            out[b, width - len(row) :] = row
            mask.append([0] * (width - len(row)) + [1] * len(row))
        return out, torch.tensor(mask, device=embeds.device)

    def _outliers(self, image: Located, score: Tensor) -> Tensor:
        """Tokens of a picture by descending score; with a thumbnail its own, then a newline."""
        _, crops = image.capture.layouts[image.number]
        if crops is None:
            return descending(score[None])[0, : self.num_outliers]
        segment = crops.segment.to(score.device)
        within = descending(score.masked_fill(segment != 0, -math.inf)[None])[0]
        count = min(self.num_outliers, int((segment == 0).sum()))
        newline = torch.where(segment == -1)[0][:1]
        return torch.cat([within[:count], newline])


def _encode(
    adapter: ModelAdapter, signal: Signal, inputs: Mapping[str, Any]
) -> tuple[EncoderCapture, tuple[Tensor, ...]]:
    """Run the vision encoder once and keep one signal of the feature layer."""
    layer = adapter.feature_layer()
    sink = EncoderSink(adapter, frozenset({signal}), (layer,), (), "auto")
    names = inspect.signature(adapter.base.get_image_features).parameters
    call = {name: value for name, value in inputs.items() if name in names}
    check_choice_of_features(adapter, adapter.feature_choice({}), call, ("DAMRO",))
    undo = watch(adapter.encoder_attentions()[layer])
    try:
        with watching(sink):
            output = adapter.base.get_image_features(**call)
    finally:
        undo()
    features = adapter.features("image", output)
    return EncoderCapture(adapter, "image", features, call, sink), features
