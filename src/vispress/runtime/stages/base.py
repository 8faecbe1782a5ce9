"""State what a stage is: one file that says where it acts, what it changes and what it refuses.

A file of this package has one function, `bind`, which makes the stage of a chain when a model is
compressed (None where no method has a part in it). The stage is immutable. For every language-model
call in which it has something to do, it opens a `StageCall`, which dies with that call, however it
ends. Both are final and made of parts that a stage gives or leaves out: nothing is inherited, and
the spine (`forward.prefill`) runs what is there and names none. `stages.bind_all` finds the files.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, final

from torch import Tensor, nn
from transformers.cache_utils import Cache

from vispress.adapters.base import Modality, ModelAdapter
from vispress.methods.base import Compressor
from vispress.runtime.forward.decision import Decision
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.hooks.attention import Softmax
from vispress.runtime.hooks.head_shards import HeadShards
from vispress.runtime.plan.bound import BoundPlacement
from vispress.runtime.plan.plan import Plan
from vispress.types import Stage


@dataclass(frozen=True, eq=False)
class Binding:
    """What a stage is made from.

    Args:
        adapter: Knows the model.
        methods: The chain of compressors.
        placements: Bound placements of the whole chain, in order.
        notes: Remarks for reports; a stage adds its own.
        backend: Kernels to use.
    """

    adapter: ModelAdapter
    methods: Sequence[Compressor]
    placements: Sequence[BoundPlacement]
    notes: list[str]
    backend: Any

    def carried_by(self, carries: frozenset[Stage]) -> tuple[BoundPlacement, ...]:
        """Placements of some stages."""
        return tuple(bound for bound in self.placements if bound.placement.stage in carries)


@dataclass(eq=False)
class Entering:
    """Hidden states on their way into a decoder layer.

    Args:
        number: The layer.
        module: Its module; the language model for what acts before the LLM.
        hidden: `[B, P, D]`; before the LLM at the logical length.
        kwargs: Keyword arguments of the module, as transformers made them.
    """

    number: int
    module: Any
    hidden: Tensor
    kwargs: dict[str, Any]


class Watched(NamedTuple):
    """What a watched layer's attention is called with.

    Args:
        query: `[B, H, P, D]`, post-RoPE.
        key: `[B, Hkv, S, D]`, the past included.
        value: `[B, Hkv, S, D]`.
        mask: As its implementation takes it, or None.
        softmax: How the layer makes weights of logits.
        shards: Processes that have the other heads, if there are any.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    softmax: Softmax
    shards: HeadShards | None = None


Attend = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""A layer's attention as a function of its values `[B, Hkv, S, D]`."""


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class StageCall:
    """What a stage does in one language-model call; what it leaves out costs nothing.

    Args:
        own_from: First decoder layer that is handed a mask of its own, short or not.
        before_placement: Reads what a placement of any stage needs to be decided.
        place: Carries out a placement of this stage on the hidden states that would enter its
            layer; None when no row moves and no value changes.
        enter: Changes the hidden states that enter a layer, behind its placements.
        layer_kwargs: Changes the keyword arguments of a layer, cut to its rows.
        attend: Looks at a watched layer's attention, and gives the mask to use.
        attention: Computes the attention of one of `RuntimeStage.watched_layers`: is handed the
            layer, the values, and what gives the output `[B, P, H, D]` and the weights (or None)
            for any values.
        feed_forward: Computes the MLP of one of `RuntimeStage.mlp_layers`, of `[B, P, D]`, in place
            of it; is handed the layer, the module and its own forward.
        leave: Changes the hidden states that leave one of `RuntimeStage.left_layers`.
        end: Finishes behind the last layer.
        remarks: Says for a report what happened in this call, when one is asked for.
    """

    own_from: int | None = None
    before_placement: Callable[[BoundPlacement, Entering], None] | None = None
    place: Callable[[BoundPlacement, Tensor], Decision | None] | None = None
    enter: Callable[[int, Tensor], Tensor] | None = None
    layer_kwargs: Callable[[int, Tensor, dict[str, Any]], dict[str, Any]] | None = None
    attend: Callable[[int, Watched], Tensor | None] | None = None
    attention: Callable[[int, Tensor, Attend], tuple[Tensor, Tensor | None]] | None = None
    feed_forward: Callable[[int, nn.Module, Callable[[Tensor], Tensor], Tensor], Tensor] | None = (
        None
    )
    leave: Callable[[int, Tensor], Tensor] | None = None
    end: Callable[[], None] | None = None
    remarks: Callable[[], Sequence[str]] | None = None


class Prepared(Protocol):
    """A decode step on a growing cache, whose layers find their keyword arguments in a list."""

    by_layer: list[dict[str, Any]] | None
    """What differs for each layer, one dictionary for layers that hold the same; a layer takes its
    own when it is entered."""


StepAttend = Callable[[int, Tensor, Tensor, Tensor | None, Mapping[str, Any]], Tensor | None]
"""Is shown a watched layer's number, query, key, mask and keyword arguments in a prepared step;
gives the mask to use."""


@final
class StepCall(NamedTuple):
    """What a stage does in a prepared decode step: of one token, without gradients and autocast.

    Args:
        layers: Layers whose attention it is shown.
        attend: Is shown them.
    """

    layers: range
    attend: StepAttend


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class RuntimeStage:
    """One stage of a chain on one model.

    Its functions are bound methods, never closures: so a deep copy of the model has its own.

    Args:
        carries: Stages whose placements it carries out.
        open: Begins a call; None when there is nothing to do in it.
        order: Place among the stages that act on one layer, ascending.
        open_static: Begins a decode step on a static cache, which may be compiled: tensors only.
        open_step: Begins a prepared decode step, and refuses what it cannot work with; None when
            there is nothing to do in it.
        refuse: Refuses an attention implementation or a cache that the stage cannot work with, by
            an `UnsupportedModelError`; asked when a model is compressed (without a cache) and at
            each call that it opens.
        watched_layers: Decoder layers whose attention it must see.
        left_layers: Decoder layers whose output it changes.
        gated_layers: Decoder layers in which it may scale what the MLP adds.
        mlp_layers: Decoder layers whose MLP it may compute in place of the module.
        install: Puts in hooks beside those of decoder layers, the same ones on one model whatever
            the hyper-parameters; gives what undoes them.
        encode: Acts in one call of the vision encoder; yields what a report is told of it.
        remembers: The method that goes on acting while decoding, by what it left in the cache.
    """

    carries: frozenset[Stage]
    open: Callable[[ForwardState], StageCall | None]
    order: int
    open_static: Callable[[Plan, Cache], StageCall | None] | None = None
    open_step: Callable[[Plan, Cache, Prepared], StepCall | None] | None = None
    refuse: Callable[[str | None, Cache | None], None] | None = None
    watched_layers: frozenset[int] = frozenset()
    left_layers: frozenset[int] = frozenset()
    gated_layers: frozenset[int] = frozenset()
    mlp_layers: frozenset[int] = frozenset()
    install: Callable[[], Sequence[Callable[[], None]]] | None = None
    encode: Callable[[Modality, Mapping[str, Any]], AbstractContextManager[Any]] | None = None
    remembers: Compressor | None = None
