"""Say what a method that evicts visual tokens from the KV cache is asked, and what it is shown."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from vispress.kinds import Queries


@dataclass(frozen=True, kw_only=True)
class CachedTokens:
    """Visual tokens of a bucket of images in one decoder layer's cache; one row an image.

    Args:
        layer: Decoder layer, and how many the LLM has.
        keys: `[B, Hkv, N, Dh]`, as they are cached (post-RoPE).
        values: `[B, Hkv, N, Dh]`.
        attention: `[B, H, Q, N]` in at least fp32, rows as `CacheEvictor.queries` says,
            post-softmax over all keys of the layer.
        index: `[B, N]` int64 ascending, place of each token in the image's original raster.
        num_original: Tokens the image had at the start.
    """

    layer: tuple[int, int]
    keys: Float[Tensor, "B Hkv N Dh"]
    values: Float[Tensor, "B Hkv N Dh"]
    attention: Float[Tensor, "B H Q N"]
    index: Int[Tensor, "B N"]
    num_original: int

    def row(self, number: int) -> "CachedTokens":
        """One image of the bucket."""
        one = slice(number, number + 1)
        return replace(
            self,
            keys=self.keys[one],
            values=self.values[one],
            attention=self.attention[one],
            index=self.index[one],
        )


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """What stays cached of each image in one layer.

    Args:
        keep: `[B, Hkv, K]` int64 into N, strictly ascending, or `[B, 1, K]` for all KV heads.
        assign: `[B, Hkv or 1, N]` int64; which kept slot (0..K-1) each token is folded into, -1 for
            none. Survivors that keep themselves must name their own slot.
        weight: `[B, Hkv or 1, N]`; a slot's new key (and value) is the sum of weight * key over its
            tokens.
    """

    keep: Int[Tensor, "B Hk K"]
    assign: Int[Tensor, "B Hk N"] | None = None
    weight: Float[Tensor, "B Hk N"] | None = None


class CacheEvictor(ABC):
    """A compressor's part behind the prefill, for a placement with `Stage.CACHE`.

    The prefill itself is exact: in each layer from the placement's on, its attention runs on all
    keys, then visual tokens leave that layer's cache, as many of each KV head. Text stays. What is
    decoded later sees what is left; positions are kept.
    """

    queries: ClassVar[Queries] = Queries.LAST
    """Whose attention rows are shown."""
    allocates: ClassVar[bool] = False
    """True: `allocate` shares the budget among layers, once all of them were measured."""

    @abstractmethod
    def plan_cache(self, tokens: CachedTokens, num_keep: int) -> CachePlan:
        """Decide what stays cached in one layer.

        Args:
            tokens: What the layer's cache holds of the images.
            num_keep: Tokens of each image that stay, below N.
        """

    def measure(self, tokens: CachedTokens) -> Float[Tensor, "B"]:
        """Measure a layer for `allocate`; asked of methods that allocate only."""
        raise NotImplementedError

    def allocate(self, measures: Sequence[Float[Tensor, "B"]], num_keep: int) -> list[list[int]]:
        """Share a budget among layers; asked of methods that allocate only.

        Args:
            measures: One a layer, ascending.
            num_keep: Mean number of tokens of each image that stay in a layer.

        Returns:
            `[layers][B]` tokens that stay.
        """
        raise NotImplementedError
