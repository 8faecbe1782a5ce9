"""Say which methods go on acting, while decoding, on what they left in a KV cache."""

from dataclasses import dataclass
from typing import Any, Final

from transformers.cache_utils import Cache

from vispress.errors import CompressionStateError
from vispress.methods.base import Compressor

_ATTRIBUTE: Final = "_vispress_remembering"


@dataclass(frozen=True)
class Remembering:
    """Methods for which a cache layer remembers more than keys, values and their places.

    Equal by value, so that copies of a model and of its caches go together.

    Args:
        methods: In the order of their stages.
    """

    methods: tuple[Compressor, ...] = ()

    def begin(self, cache: Cache) -> None:
        """Note in a cache that a prefill of this plan is stored in it."""
        if self.methods or hasattr(cache, _ATTRIBUTE):  # a static cache may be reset and used again
            setattr(cache, _ATTRIBUTE, self)

    def check(self, cache: Any) -> None:
        """Refuse to go on from a cache in which another plan's methods remember.

        Raises:
            CompressionStateError: Says what would work.
        """
        held = getattr(cache, _ATTRIBUTE, None)
        if held is None or held is self or held == self or not held.methods:
            return
        now = ", ".join(map(str, self.methods)) or "no method that does"
        raise CompressionStateError(
            f"this KV cache was filled under {', '.join(map(str, held.methods))}, which goes on "
            f"acting while decoding, and the model is compressed by {now}: set it back by "
            "update_compression, or start with a new cache"
        )
