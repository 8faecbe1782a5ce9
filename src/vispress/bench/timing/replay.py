"""A method's overhead, from a replay: its prefill with the choice already made."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import final

from torch import nn

from vispress.methods.base import Compressor
from vispress.methods.cache_evictor import CacheEvictor
from vispress.methods.cached_selector import CachedSelector
from vispress.methods.compute_pruner import ComputePruner
from vispress.methods.encoder_merger import EncoderMerger
from vispress.methods.encoder_pooler import EncoderPooler
from vispress.methods.gist_evictor import GistEvictor
from vispress.methods.pair_masker import PairMasker
from vispress.types import ModuleShape, Placement, Signal, TokenPlan, VisualTokens

_SHOWN = tuple(
    name
    for name, kind in Compressor.__annotations__.items()
    if str(kind).startswith("typing.ClassVar") and name != "reads"
)
"""What the runtime may ask of a compressor's class: a stand-in answers as the other one does."""


@dataclass(frozen=True, kw_only=True)
class _StandIn(Compressor):
    """A compressor that acts where another one does.

    Args:
        method: The other one.
    """

    method: Compressor

    def __post_init__(self) -> None:
        for shown in _SHOWN:
            if hasattr(self.method, shown):
                object.__setattr__(self, shown, getattr(self.method, shown))

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return self.method.placements(num_layers)

    def make_module(self, shape: ModuleShape) -> nn.Module | None:
        """Make the wrapped method's parameters."""
        return self.method.make_module(shape)

    def encoder_merger(self) -> EncoderMerger | None:
        """Pass on the wrapped method's: what merges in the encoder is no choice for the LLM."""
        return self.method.encoder_merger()

    def encoder_pooler(self) -> EncoderPooler | None:
        """Pass on the wrapped method's, likewise."""
        return self.method.encoder_pooler()

    def pair_masker(self) -> PairMasker | None:
        """Pass on the wrapped method's: what is masked is no choice of tokens."""
        return self.method.pair_masker()

    def cache_evictor(self) -> CacheEvictor | None:
        """Pass on the wrapped method's: what leaves the cache does so behind the prefill."""
        return self.method.cache_evictor()

    def gist_evictor(self) -> GistEvictor | None:
        """Pass on the wrapped method's: what stands for an image is part of the prompt."""
        return self.method.gist_evictor()

    def compute_pruner(self) -> ComputePruner | None:
        """Pass on the wrapped method's: what layers compute is no choice of tokens."""
        return self.method.compute_pruner()

    def cached_selector(self) -> CachedSelector | None:
        """Pass on the wrapped method's: a choice while decoding is none of the prefill."""
        return self.method.cached_selector()


@final
@dataclass(frozen=True, kw_only=True)
class Recorder(_StandIn):
    """Does what the other one does and notes its plans.

    Args:
        log: Where plans go, in the order they are made.
    """

    log: list[TokenPlan]

    def signals(self) -> frozenset[Signal]:
        return self.method.signals()

    def views(self) -> tuple[Compressor, ...]:
        return self.method.views()

    def encoder_layers(self, num_layers: int, feature_layer: int) -> tuple[int, ...]:
        return self.method.encoder_layers(num_layers, feature_layer)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        """Note the wrapped method's plan."""
        plan = self.method.plan(tokens, num_keep)
        self.log.append(plan)
        return plan


@final
@dataclass(frozen=True, kw_only=True)
class Replay(_StandIn):
    """Keeps what was kept before, at the same placements; reads no signals, merges nothing.

    Args:
        plans: Of one prefill after the other.
    """

    plans: Iterator[TokenPlan]

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        """Place the recorded plans, without attention rows, probes and transitions."""
        return tuple(
            replace(placement, queries=None, probe=None, transitions=())
            for placement in self.method.placements(num_layers)
        )

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        """Repeat what was kept, and what decides which buckets the next placement asks about."""
        plan = next(self.plans)
        memory = tuple(replace(memory, attention=False) for memory in plan.memory)
        return TokenPlan(keep=plan.keep, memory=memory, gate=plan.gate, bypassed=plan.bypassed)


def recorders(chain: Sequence[Compressor]) -> tuple[list[Compressor], list[list[TokenPlan]]]:
    """Make stand-ins for a chain, and where each of them notes its plans."""
    logs: list[list[TokenPlan]] = [[] for _ in chain]
    made: list[Compressor] = [
        Recorder(method=method, log=log) for method, log in zip(chain, logs, strict=True)
    ]
    return made, logs


def replays(chain: Sequence[Compressor], logs: Sequence[Sequence[TokenPlan]]) -> list[Compressor]:
    """Make stand-ins that repeat one recorded prefill of a chain, as often as it is run."""
    return [
        Replay(method=method, plans=cycle(log)) for method, log in zip(chain, logs, strict=True)
    ]
