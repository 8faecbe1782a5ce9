"""Carry what the vision encoder showed to the images of a bucket, as methods read it."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vispress.kinds import ENCODER_SIGNALS
from vispress.methods.base import Compressor
from vispress.runtime.encoder.capture import EncoderCapture, projector_function
from vispress.runtime.forward.bucket_view import on_device, pick, stacked
from vispress.runtime.plan.plan import Plan
from vispress.types import ATTENTION_SIGNALS, Signal

FROM_ENCODER = ENCODER_SIGNALS | {Signal.PROJECTOR, Signal.ENCODER_GROUPS}
"""What `encoder_signals` collects."""


class Captured(Protocol):
    """An image or video whose encoder call is kept."""

    @property
    def capture(self) -> EncoderCapture:
        """What the encoder call showed."""

    @property
    def number(self) -> int:
        """Place in that call."""

    @property
    def num_visual(self) -> int:
        """Tokens at the start."""


def encoder_signals(
    plan: Plan,
    method: Compressor,
    images: Sequence[Captured],
    index: Tensor,
    reads: frozenset[Signal],
) -> dict[str, Any]:
    """Collect what the vision encoder showed of images of one shape.

    Args:
        plan: What is asked of the model.
        method: Whose signals these are.
        images: Where the encoder call of each is kept, one a row.
        index: `[Bk, N]` int64, raster index of the tokens that are still there.
        reads: The method's signals.

    Returns:
        Fields of `VisualTokens`.
    """
    adapter, device = plan.adapter, index.device
    out: dict[str, Any] = {}

    def per_image(values: list[Tensor], axis: int) -> Tensor:
        """Images to rows; only the tokens that are still there."""
        whole = on_device(stacked(values), device)
        if index.shape[1] == images[0].num_visual:
            return whole
        return pick(whole, axis, index, plan.backend)

    for signal in ATTENTION_SIGNALS:
        if signal in reads:
            layers = plan.encoder_layers(method, signal)
            values = [i.capture.attention(signal, layers, i.number) for i in images]
            out[signal.value] = per_image(values, values[0].ndim)
    if Signal.VISION_KEYS in reads:
        (*_, layer) = plan.encoder_layers(method, Signal.VISION_KEYS)
        out["vision_keys"] = per_image([i.capture.keys(layer, i.number) for i in images], 2)
    if Signal.VISION_FEATURES in reads:
        inputs = [i.capture.vision_features(i.number) for i in images]
        out["vision_features"] = per_image(inputs, 1)
    if Signal.ENCODER_GROUPS in reads:
        alone = torch.arange(images[0].num_visual, device=device)
        groups = [i.capture.encoder_groups(i.number) for i in images]
        values = [alone if group is None else group.to(device) for group in groups]
        out["encoder_groups"] = per_image(values, 1)
    if Signal.PROJECTOR in reads:
        out["projector"] = projector_function(adapter)
        two_layer = adapter.two_layer()
        out["two_layer"] = None if two_layer is None else two_layer.to(device)
    if Signal.PADDING in reads and adapter.square_encoder() is not None:
        out["padding"] = per_image([i.capture.padding(i.number) for i in images], 1)
    return out
