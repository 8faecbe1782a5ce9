"""The course of a video through the LLM's first layers, for a budget met as a mean over layers."""

import math
from dataclasses import dataclass, replace

from vispress.budget import Budget, ratio_left
from vispress.types import Memory


def last_layer(mean: float, num_layers: int) -> int:
    """The layer, at least 1, up to which all tokens may stay without using up the mean."""
    return max(1, math.ceil(mean * num_layers) - 1)


@dataclass(frozen=True)
class MeanBudgetTracker:
    """What each layer so far has seen.

    Args:
        shares: Of the tokens that entered the LLM, one a layer.
        merging: Whether merging goes on.
    """

    shares: tuple[float, ...] = ()
    merging: bool = True

    def goal(self, mean: float, num_layers: int, entered: int) -> int:
        """What the next layer and all behind it may see, for this mean over layers."""
        ratio = min(1.0, ratio_left(mean, self.shares, num_layers))
        return Budget(keep_ratio=ratio).resolve(entered)

    def after(self, left: int, entered: int, least: float) -> "MeanBudgetTracker":
        """The course with one more layer, which sees `left` tokens.

        Merging ends where it took less than `least` of what there was.
        """
        share = left / entered
        before = self.shares[-1] if self.shares else 1.0
        return replace(
            self,
            shares=(*self.shares, share),
            merging=self.merging and 1 - share / before >= least,
        )

    def memory(self, last: int, *, over: bool) -> Memory:
        """What the runtime carries on; `last`: the layer of the last placement."""
        prunes = not self.merging or len(self.shares) == last
        return Memory(value=self, attention=prunes, over=over)
