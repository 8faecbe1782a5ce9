"""Where a compressor acts, and what it reads there."""

from dataclasses import dataclass
from typing import Literal

from vispress.budget import Budget
from vispress.kinds import Queries, Stage


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a compressor acts, how much it keeps there, and what it must have seen.

    Args:
        stage: ENCODER merges in the vision encoder (see `EncoderMerger`), or pools between its
            layers (see `EncoderPooler`), and hides nothing from the LLM; PRE_LLM acts on the LLM's
            input, IN_LLM before decoder layer `layer`; DECODE hides cached tokens from `layer` and
            those behind it, step by step (see `CachedSelector`); MASK drops nothing and masks pairs
            in these layers (see `PairMasker`); SKIP lets rows bypass the layers from `layer` up to
            `until`; CACHE evicts visual tokens from the KV cache of `layer` and those behind it,
            behind their prefill (see `CacheEvictor`), or behind tokens that stand for them (see
            `GistEvictor`); COMPUTE drops nothing and lets these layers compute less for visual
            tokens (see `ComputePruner`).
        budget: What is kept of the tokens that reached the compressor's first placement; in the
            encoder, of the tokens of an image.
        layer: Decoder layer (0-based) before which rows are dropped; 0 for ENCODER and PRE_LLM.
        queries: Rows of `query_attention`, if the method reads it.
        attention_of: `"previous"`: the attention of layer `layer - 1`, as it ran. `"next"`: what
            layer `layer` would compute on the rows that are still there (only q and k are
            computed).
        attention_depth: Layers read, that one the last ("previous" only); 1, or an axis more.
        transitions: Decoder layers whose module inputs and outputs are measured up to here.
        adaptive: The method decides how much it keeps; `budget` is the most.
        images: Which images of a prompt it acts on; the others pass.
        until: Rows outside bypass the layers up to this one, where they come back as they were.
        probe: PRE_LLM: attention is that of this decoder layer, in a pass of its own through the
            layers up to it, on what is there; it costs their time and leaves nothing behind.
    """

    stage: Stage
    budget: Budget
    layer: int = 0
    queries: Queries | None = None
    attention_of: Literal["previous", "next"] = "previous"
    attention_depth: int = 1
    transitions: tuple[int, ...] = ()
    adaptive: bool = False
    images: Literal["all", "earlier", "last"] = "all"
    until: int | None = None
    probe: int | None = None
