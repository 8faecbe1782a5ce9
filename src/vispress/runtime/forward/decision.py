"""Hold what a placement decided, so that it can be repeated on other hidden states."""

from dataclasses import dataclass

from torch import Tensor

from vispress.runtime.tokens.images import Bucket
from vispress.runtime.tokens.live_tokens import LiveTokens
from vispress.types import TokenPlan
from vispress_kernels import Backend


@dataclass(eq=False)
class Change:
    """New values for the kept tokens of one bucket."""

    before: Bucket
    kept: Bucket
    plan: TokenPlan


@dataclass(eq=False)
class Decision:
    """What a placement did; a checkpointed layer that runs again repeats it.

    Args:
        before: Live tokens that entered.
        rows: Live tokens behind it.
        local: `[B, P']`, place of each in `before`.
        changes: Buckets whose survivors change value.
        backend: Kernels to use.
    """

    before: LiveTokens
    rows: LiveTokens
    local: Tensor
    changes: list[Change]
    backend: Backend
