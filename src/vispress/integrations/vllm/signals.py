"""Show vispress what vLLM's vision encoder computes: attention, keys, the projector's input.

Hooks sit on modules of one model and collect during one encoder call, in the same sink that a
compressed model of transformers has; what follows from it is vispress's own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vispress.adapters.base import ModelAdapter
from vispress.errors import UnsupportedModelError
from vispress.kinds import Signal
from vispress.runtime.encoder.capture import EncoderSink
from vispress.runtime.plan.plan import Plan


class Watch:
    """Hooks on the vision encoder and the projector of an engine's model.

    Args:
        plan: Says what is read, and in which layers.
        attentions: The encoder's modules that are called with query, key and value, one a layer.
        projector: The module between encoder and LLM.

    Raises:
        UnsupportedModelError: A layer is read that this encoder does not have.
    """

    def __init__(self, plan: Plan, attentions: Sequence[nn.Module], projector: nn.Module) -> None:
        self._plan = plan
        self._sink: EncoderSink | None = None
        self._projected: list[Tensor] = []
        self._known = plan.adapter.encoder_attentions()
        layers = sorted({*plan.all_encoder_layers, *plan.key_layers})
        if layers and layers[-1] >= len(attentions):
            raise UnsupportedModelError(
                f"{plan.methods[0].name} reads layer {layers[-1]} of the vision encoder, of which "
                f"vLLM builds {len(attentions)}; give another feature layer"
            )
        for layer in layers:
            seen = partial(self._attends, layer)
            attentions[layer].register_forward_pre_hook(seen, with_kwargs=True)
        if Signal.VISION_FEATURES in plan.encoder_signals:
            projector.register_forward_pre_hook(self._projects)

    @contextmanager
    def watching(self) -> Iterator[EncoderSink]:
        """Collect from the encoder call inside the block."""
        plan = self._plan
        self._sink = sink = EncoderSink(
            plan.adapter,
            plan.encoder_signals,
            plan.all_encoder_layers,
            plan.key_layers,
            plan.backend,
        )
        try:
            yield sink
            if self._projected:  # some models project image by image
                sink.projector_input = torch.cat(self._projected)
        finally:
            self._sink, self._projected = None, []

    def _projects(self, module: nn.Module, args: Any) -> None:
        if self._sink is not None:
            self._projected.append(args[0])

    def _attends(self, layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self._sink is None:
            return
        given = dict(zip(("query", "key", "value", "cu_seqlens"), args, strict=False)) | kwargs
        query = _heads(given["query"], module.num_heads)
        key = _heads(given["key"], module.num_kv_heads)
        scaling = {"scaling": module.scale}
        for part in _spans(given.get("cu_seqlens"), query.shape[2]):
            self._sink.observe(
                self._known[layer], query[:, :, part], key[:, :, part], None, scaling
            )


def _heads(states: Tensor, heads: int) -> Tensor:
    """`[P, n, H * Dh]` or `[P, n, H, Dh]` as `[P, H, n, Dh]`."""
    apart = states.reshape(*states.shape[:2], heads, -1)
    return apart.transpose(1, 2)


def _spans(bounds: Tensor | None, length: int) -> Sequence[slice]:
    """Parts of a packed sequence that attend to themselves; all of it without bounds."""
    if bounds is None:
        return [slice(0, length)]
    ends = bounds.tolist()
    return [slice(a, b) for a, b in pairwise(ends) if b > a]


@torch.no_grad()
def take_projector(adapter: ModelAdapter, theirs: nn.Module) -> None:
    """Let the projector of transformers, which has no weights, hold those of vLLM's.

    Called when they are loaded: vLLM may pack its own for the device afterwards.

    Raises:
        UnsupportedModelError: vLLM's has others (it is quantised, or dealt out to processes).
    """
    ours = adapter.projector
    found = dict(theirs.named_parameters())
    for name, parameter in list(ours.named_parameters()):
        weight = found.get(name)
        if weight is None or weight.shape != parameter.shape or not weight.is_floating_point():
            raise UnsupportedModelError(
                f"vLLM's projector has no {name} of shape {tuple(parameter.shape)}: it is "
                "quantised or dealt out; methods that read the projector need it whole and plain"
            )
        owner, _, leaf = name.rpartition(".")
        data = nn.Parameter(weight.detach(), requires_grad=False)
        ours.get_submodule(owner)._parameters[leaf] = data
