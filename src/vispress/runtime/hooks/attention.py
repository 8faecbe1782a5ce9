"""Watch attention, and recompute rows of it from the q and k that it is called with.

One attention function is registered per underlying implementation. Attention modules that are to be
watched get a view of their config that names it; it shows q and k to the call that runs and then
calls the model's own implementation.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from vispress.precision import full_precision

_PREFIX = "vispress_watching_"
OBSERVER: Final = "vispress_running"
"""Keyword argument of a watched decoder layer's attention: the call that runs, whose `attend` is
shown q, k and mask and gives the mask to use; `shown` in its place, in a prepared decode step. It
rides from the language model down, so that a checkpointed layer that runs again and a compiled step
find it, and another thread's never does."""


class EncoderObserver(Protocol):
    """Receives what a watched attention module of the vision encoder is about to compute."""

    def observe(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        """Args: module, post-RoPE query `[B, H, Q, D]` and key `[B, Hkv, S, D]`, mask as passed."""


# Encoders hand no keywords of their own to their attention, so what watches them is found by
# context. It is set for one encoder call alone and reset by `finally`, whatever ends that call.
_SINK: ContextVar[EncoderObserver | None] = ContextVar("vispress_sink", default=None)


@contextmanager
def watching(sink: EncoderObserver | None) -> Iterator[None]:
    """Send what watched encoder attention computes to `sink` inside the block (this context)."""
    token = _SINK.set(sink)
    try:
        yield
    finally:
        _SINK.reset(token)


def current_sink() -> EncoderObserver | None:
    """Give the sink of this context; none in a compiled graph, which reading it would break."""
    return None if torch.compiler.is_compiling() else _SINK.get()


class Merge(Protocol):
    """What is merged or pooled in the vision encoder (`EncoderMerge`, `EncoderPool`)."""

    def leave(self, out: Tensor) -> Tensor:
        """What a layer hands on, of what it gave."""


_MERGE: ContextVar[Any] = ContextVar("vispress_merge", default=None)


@contextmanager
def merging(merge: Merge) -> Iterator[None]:
    """Let the hooks of the vision encoder see `merge` inside the block (this context only)."""
    token = _MERGE.set(merge)
    try:
        yield
    finally:
        _MERGE.reset(token)


def current_merge() -> Any:
    """The merge of this context, or None; none in a graph, which reading a context would break."""
    return None if torch.compiler.is_compiling() else _MERGE.get()


class ConfigView:
    """A config seen through, with another attention implementation named on top."""

    def __init__(self, config: Any) -> None:
        self.__dict__["_vispress_config"] = config

    def __getattr__(self, name: str) -> Any:
        if name == "_vispress_config":  # not there yet while being copied
            raise AttributeError(name)
        return getattr(self._vispress_config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._vispress_config, name, value)

    @property
    def _attn_implementation(self) -> str:
        name = self._vispress_config._attn_implementation or "eager"
        return _REGISTERED[name] if name in _REGISTERED else _register(name)


def watch(module: nn.Module) -> Callable[[], None]:
    """Let a module's attention be seen by sinks; returns the undo."""
    original = module.config
    if isinstance(original, ConfigView):  # several placements may want one layer
        return lambda: None
    module.config = ConfigView(original)  # type: ignore[assignment]
    return partial(setattr, module, "config", original)


def watch_layer(layer: Any) -> list[Callable[[], None]]:
    """Let the attention of a decoder layer be seen, if it has weights; returns the undo."""
    return [watch(layer.self_attn)] if hasattr(layer, "self_attn") else []


def implementation_of(module: nn.Module) -> str:
    """The attention implementation of a module, watched or not."""
    config: Any = module.config
    config = config._vispress_config if isinstance(config, ConfigView) else config
    return getattr(config, "_attn_implementation", None) or "eager"


_REGISTERED: dict[str, str] = {}
"""Watching twins of implementations: every layer asks, at every step."""


def _register(implementation: str) -> str:
    """Make sure the watching twin of an implementation exists; returns its name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if implementation.startswith(_PREFIX):
        return implementation
    name = _PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, partial(_watched_attention, implementation))
    _REGISTERED[implementation] = name
    return name


def _watched_attention(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    running: Any = None
    if OBSERVER in kwargs:  # no calls: watched layers of decode steps come here
        running = kwargs[OBSERVER]
        del kwargs[OBSERVER]
    prepared = running is not None and running.shown is not None
    if prepared:
        attention_mask = running.shown(module.layer_idx, query, key, attention_mask, kwargs)
    elif running is not None:
        with full_precision():
            attention_mask = running.attend(
                module, query, key, value, attention_mask, implementation, kwargs
            )
    elif not torch.compiler.is_compiling():  # reading a context would break a graph
        sink, merge = _SINK.get(), _MERGE.get()
        if sink is not None or merge is not None:
            with full_precision():
                if sink is not None:
                    sink.observe(module, query, key, attention_mask, kwargs)
                if merge is not None:
                    attention_mask = merge.attend(key, attention_mask, implementation)
    if implementation == "eager":  # not in the registry: each modeling file has its own
        run = sys.modules[_defining_module(module)].eager_attention_forward
    elif prepared and implementation in running.functions:
        run = running.functions[implementation]
    else:
        run = ALL_ATTENTION_FUNCTIONS[implementation]
        if prepared:
            running.functions[implementation] = run
    if running is None or running.attention is None:
        return run(module, query, key, value, attention_mask, **kwargs)
    return running.attention(
        module.layer_idx,
        value,
        lambda values: run(module, query, key, values, attention_mask, **kwargs),
    )


def _defining_module(module: nn.Module) -> str:
    for cls in type(module).__mro__:
        if hasattr(sys.modules.get(cls.__module__), "eager_attention_forward"):
            return cls.__module__
    raise RuntimeError(f"no eager attention found for {type(module).__name__}")


@dataclass(frozen=True, eq=False)
class Softmax:
    """How a layer turns products of queries and keys into weights.

    Args:
        scaling: Factor on the products.
        softcap: Bound that a tanh keeps the logits in (Gemma 2), or None.
        sinks: `[H]`, logits that take a share of each query's weight beside its keys' (gpt-oss).
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> "Softmax":
        """Read it off the keyword arguments of an attention function."""
        return cls(kwargs["scaling"], kwargs.get("softcap"), kwargs.get("s_aux"))

    @property
    def plain(self) -> bool:
        """Whether a factor is all there is, which is what kernels compute."""
        return self.softcap is None and self.sinks is None


def attention_rows(
    query: Tensor,
    key: Tensor,
    allowed: Tensor | None,
    softmax: Softmax,
    *,
    blocked: Tensor | None = None,
) -> Tensor:
    """Post-softmax attention of a few queries, not for gradients.

    Args:
        query: `[B, H, R, D]`, the wanted rows.
        key: `[B, Hkv, S, D]`; heads are shared in groups (GQA).
        allowed: `[B, 1, R, S]` bool (True = attend), or float (added), or None for all keys.
        softmax: How the layer makes weights of them.
        blocked: The opposite of a bool `allowed`, which may then be None.

    Returns:
        `[B, H, R, S]` in fp32 (fp64 for fp64 inputs).
    """
    B, H, R, D = query.shape
    groups = H // key.shape[1]
    dtype = query.dtype if query.dtype.itemsize >= 4 else torch.float32
    if query.dtype != dtype or key.dtype != dtype:
        query, key = query.to(dtype), key.to(dtype)
    grouped = query.reshape(B, key.shape[1], groups * R, D)
    # in place: all heads of many rows are large
    logits = (grouped @ key.mT).view(B, H, R, key.shape[2])
    logits *= softmax.scaling
    if softmax.softcap is not None:
        logits.div_(softmax.softcap).tanh_().mul_(softmax.softcap)
    if allowed is not None and allowed.dtype == torch.bool:
        blocked = ~allowed
    elif allowed is not None:
        logits += allowed.to(dtype)
    if blocked is not None:
        logits.masked_fill_(blocked, float("-inf"))
    # a row with no key at all (padding) gives zeros, not NaN
    rows = logits.softmax(dim=-1).nan_to_num_(0.0)
    if softmax.sinks is not None:  # the share of the keys, given how much they and the sink weigh
        sinks = softmax.sinks.detach().to(dtype).view(1, H, 1, 1)
        rows *= (logits.logsumexp(dim=-1, keepdim=True) - sinks).sigmoid_()
    return rows
