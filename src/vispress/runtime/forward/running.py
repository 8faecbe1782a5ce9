"""Carry one language-model call to its layers: the state, and what each stage does in it.

The object rides as a keyword argument: of the language model to its decoder layers, of a watched
layer to its attention. So it belongs to the call, not to a module or a thread: a checkpointed layer
that runs again finds it, and nothing is left behind when a forward ends, in whatever way.
"""

import gc
import weakref
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final

import torch
from torch import Tensor

from vispress.errors import CompressionStateError
from vispress.precision import full_precision
from vispress.runtime.forward.layer_inputs import LayerInputs
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.hooks.attention import OBSERVER, Softmax
from vispress.runtime.hooks.instance_patch import Original
from vispress.runtime.plan.bound import BoundPlacement
from vispress.runtime.stages.base import Entering, StageCall, Watched
from vispress.runtime.tokens.live_tokens import live_deepstack
from vispress.types import Stage

RUNNING: Final = OBSERVER
"""Keyword argument of the language model, its layers and their attention: the call that runs."""
MEASURED: ContextVar["weakref.ref[Running] | None"] = ContextVar("vispress_measured", default=None)
"""The call whose attention was measured last in this context. Its layer's MLP runs next and is
given hidden states alone. What an interrupted call left here is dropped when the next begins, and
kept alive by nothing."""
_DEEPSTACK = "deepstack_visual_embeds"


class Running:
    """One language-model call under way.

    Args:
        state: What is known of it.
        calls: What the stages do in it, in order, and the stages whose placements each carries out.
    """

    shown: Final = None
    """It is no prepared step: watched attention comes to `attend`."""

    def __init__(
        self, state: ForwardState, calls: Sequence[tuple[frozenset[Stage], StageCall]] = ()
    ) -> None:
        self.state, self.inputs = state, LayerInputs(state)
        self.calls = [call for _, call in calls]
        self._carries = calls
        self.enters = [call.enter for call in self.calls if call.enter is not None]
        self.kwargs = [call.layer_kwargs for call in self.calls if call.layer_kwargs is not None]
        self.attends = [call.attend for call in self.calls if call.attend is not None]
        attentions = (call.attention for call in self.calls if call.attention is not None)
        self.attention = next(attentions, None)
        feeds = (call.feed_forward for call in self.calls if call.feed_forward is not None)
        self.feed_forward = next(feeds, None)
        self.leaves = [call.leave for call in self.calls if call.leave is not None]
        own = [call.own_from for call in self.calls if call.own_from is not None]
        state.own_from = min(own, default=None)
        self.remarks = [call.remarks for call in self.calls if call.remarks is not None]
        self.hooks: object = None
        """Stands for the hooks that the call was begun with."""
        self.chunks: Any = None
        """Of a chunk: `forward.chunks.Chunks`."""
        self.again = False
        """Whether a checkpointed layer has run a second time: the backward is there, or over."""
        self._attended: set[int] = set()

    def to(self, *args: Any, **kwargs: Any) -> "Running":
        """Stay: accelerate's hooks move keyword arguments between devices."""
        return self

    def before_placement(self, bound: BoundPlacement, entering: Entering) -> None:
        """Let stages read what a placement needs."""
        for call in self.calls:
            if call.before_placement is not None:
                call.before_placement(bound, entering)

    def place(self, bound: BoundPlacement, hidden: Tensor) -> Any:
        """Carry out a placement by its stage."""
        for carries, call in self._carries:
            if bound.placement.stage in carries and call.place is not None:
                with full_precision():
                    return call.place(bound, hidden)
        return None

    def begin(self, hooks: object) -> None:
        """Note on which hooks the call runs, and that a backward may need them again."""
        self.hooks = hooks
        if self.state.trains and not torch.compiler.is_compiling():
            TRAINING.add(self)

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        implementation: str,
        kwargs: Mapping[str, Any],
    ) -> Tensor | None:
        """Show a watched attention to the stages, then read the rows that placements want."""
        if self.state.mode == "run":
            self.again |= module.layer_idx in self._attended
            self._attended.add(module.layer_idx)
        for attend in self.attends:
            watched = Watched(
                query, key, value, mask, Softmax.of(kwargs), self.state.plan.shards(query.shape[1])
            )
            mask = attend(module.layer_idx, watched)
        self.state.observe(module, query, key, mask, kwargs)
        return mask


TRAINING: Final = weakref.WeakSet[Running]()
"""Calls that train and are not over: what checkpoints hold lives until their backward."""


def awaited(hooks: object) -> list[Running]:
    """Find calls of which checkpointed layers are to run again, in a backward, on some hooks."""

    def find() -> list[Running]:
        return [call for call in list(TRAINING) if call.hooks is hooks and not call.again]

    if find():
        gc.collect()  # a call that failed may stand in a circle with its traceback
    return find()


def refuse_awaited(hooks: object) -> None:
    """Refuse to leave checkpointed layers, which run again in a backward, without their masks.

    Raises:
        CompressionStateError: Says when the hooks can go.
    """
    if any(call.attends for call in awaited(hooks)):
        raise CompressionStateError(
            "layers of a checkpointed call are to run again in its backward, under compression: "
            "call loss.backward() before remove_compression(model), or inside the block of "
            "compressed(...)"
        )


def refuse_reentrant(state: ForwardState, of: str) -> None:
    """Refuse a layer that a checkpoint runs without gradients, where something has some to give.

    Args:
        state: The call.
        of: What that is.

    Raises:
        CompressionStateError: Says what works.
    """
    if state.trains and not torch.is_grad_enabled():
        raise CompressionStateError(
            "reentrant gradient checkpointing runs a layer without gradients first, and those "
            f"of {of} would be lost; use gradient_checkpointing_kwargs={{'use_reentrant': False}}"
        )


class CarriedEmbeds:
    """DeepStack features of a layer, with the call that they are added in.

    Args:
        embeds: `[marks, D]`.
        state: The call's state.
    """

    def __init__(self, embeds: Tensor, state: ForwardState) -> None:
        self.embeds, self.state = embeds, state

    def to(self, *args: Any, **kwargs: Any) -> "CarriedEmbeds":
        """Stay: they are moved where they are added."""
        return self


def carry_deepstack(arguments: dict[str, Any], state: ForwardState) -> None:
    """Let DeepStack features carry the state to `_deepstack_process`, which gets no keywords."""
    embeds = arguments.get(_DEEPSTACK)
    if embeds is not None:
        plain = (e.embeds if isinstance(e, CarriedEmbeds) else e for e in embeds)
        arguments[_DEEPSTACK] = [CarriedEmbeds(each, state) for each in plain]


def add_deepstack(original: Original, hidden: Tensor, visual: Tensor, embeds: Any) -> Tensor:
    """Hand Qwen3-VL, which adds early encoder features between layers, those of live rows.

    Args:
        original: What adds them.
        hidden: `[B, P, D]`.
        visual: `[B, P]` bool, visual tokens of the whole chunk.
        embeds: `[marks, D]`, or the call's `CarriedEmbeds`.
    """
    if isinstance(embeds, CarriedEmbeds):
        state, embeds = embeds.state, embeds.embeds
        if not hidden.shape[1]:
            return hidden
        if not state.untouched:
            return live_deepstack(state.last, hidden, visual, embeds, state.plan.backend)
    result: Tensor = original(hidden, visual, embeds)
    return result
