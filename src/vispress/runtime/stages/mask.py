"""Where a chain of methods masks (text row, visual token) pairs, and what cannot do it."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers.cache_utils import Cache, StaticLayer

from vispress.adapters.base import ModelAdapter
from vispress.errors import ConfigError, UnsupportedModelError
from vispress.methods.base import Compressor
from vispress.methods.pair_masker import PairMasker
from vispress.runtime.stages.select import BoundPlacement
from vispress.runtime.tokens import masks
from vispress.types import Stage


@dataclass(frozen=True, eq=False)
class PairStep:
    """A placement that masks pairs.

    Args:
        method: The compressor.
        masker: What decides.
        first: Decoder layer from which pairs are masked.
    """

    method: Compressor
    masker: PairMasker
    first: int

    def check_implementation(self, implementation: str | None) -> None:
        """Refuse an attention implementation that has no place for a dense mask.

        Raises:
            UnsupportedModelError: It is FlashAttention.
        """
        if masks.check_implementation(implementation) == "flash":
            raise UnsupportedModelError(
                f"{self.method.name} masks pairs of text rows and image tokens, which needs a "
                f"dense mask, and {implementation!r} takes none; use 'sdpa' or 'eager', or set "
                "mass=1.0, which masks nothing"
            )

    def check_cache(self, cache: Cache | None) -> None:
        """Refuse a cache whose layers cannot remember attention.

        Raises:
            UnsupportedModelError: It is a static cache.
        """
        kinds = [] if cache is None else [type(layer) for layer in cache.layers]
        kinds.append(getattr(cache, "layer_class_to_replicate", None) or object)
        if any(issubclass(kind, StaticLayer) for kind in kinds):
            raise UnsupportedModelError(
                f"{self.method.name} remembers in the cache how text attended to images, which "
                "grows with the text: a static cache has no place for it; use DynamicCache()"
            )


def find_pair_step(
    methods: Sequence[Compressor], steps: Sequence[BoundPlacement], adapter: ModelAdapter
) -> tuple[PairStep | None, list[str]]:
    """The placement of a chain of methods that masks pairs, and remarks.

    Raises:
        ConfigError: Two methods mask pairs, or attention is read in advance of a masking layer.
        UnsupportedModelError: The model runs FlashAttention.
    """
    found: PairStep | None = None
    for method in methods:
        masker = method.pair_masker()
        if masker is None:
            continue
        if found is not None:
            raise ConfigError(
                f"{found.method.name} and {method.name} both mask pairs of text rows and image "
                "tokens, and one of a chain can; leave one out"
            )
        placements = method.placements(len(adapter.decoder_layers))
        (first,) = (p.layer for p in placements if p.stage is Stage.MASK)
        found = PairStep(method, masker, first)
    if found is None:
        return None, []
    for step in steps:
        at = step.placement
        ahead = at.layer if at.queries is not None and at.attention_of == "next" else 0
        read = ahead if at.probe is None else at.probe
        if read >= found.first:
            raise ConfigError(
                f"{step.method.name} reads the attention of decoder layer {read} before it runs, "
                f"without the pairs that {found.method.name} masks from layer {found.first} on; "
                f"start {found.method.name} at layer {read + 1}, or read an earlier layer"
            )
    found.check_implementation(adapter.language_model.config._attn_implementation)
    return found, [
        f"{found.method.name}: drops no token; from decoder layer {found.first} on, pairs of text "
        "rows and image tokens are masked, while decoding too"
    ]
