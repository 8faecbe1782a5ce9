"""The one budget of a chain: the mean of what is left of an image over decoder layers.

It is what `mean_keep_ratio` of a single method means, and `CompressionReport.mean_keep_ratio`
reports. Parts of the chain that have no budget of their own get the same `keep_ratio`, each in its
own meaning (what one placement keeps, or the mean of a schedule, of the tokens that reach it); it
is the one that gives the mean. Ours, no paper's.
"""

from collections.abc import Sequence
from dataclasses import replace

from vispress.budget import check_ratio
from vispress.errors import BudgetError
from vispress.flops import visual_per_layer
from vispress.methods.base import Compressor

_TOKENS = 10**9  # of an image on which shares are counted: rounding does not show
_STEPS = 60


class Chain(list[Compressor]):
    """Compressors in the order they act, as a file describes them.

    Args:
        parts: The compressors.
        mean_keep_ratio: Budget of the whole chain, or None where its parts bring their own.
    """

    def __init__(self, parts: Sequence[Compressor], mean_keep_ratio: float | None = None) -> None:
        super().__init__(parts)
        self.mean_keep_ratio = mean_keep_ratio


def chain_mean(chain: Sequence[Compressor], num_layers: int) -> float:
    """What a chain leaves of an image, as a mean over decoder layers, in `(0, 1]`.

    Rounding to whole tokens is not counted; an adaptive placement counts as its most.

    Raises:
        BudgetError: A part has no budget, or counts tokens (a mean is a share of the image).
        ConfigError: A part's layer is out of range.
    """
    placements = [part.placements(num_layers) for part in chain]
    for part, own in zip(chain, placements, strict=True):
        if any((count := p.budget.num_tokens) is not None and count > 0 for p in own):
            raise BudgetError(
                f"{part.name} keeps a number of tokens, which has no share in a mean over layers; "
                "give it keep_ratio, or no budget"
            )
    return sum(visual_per_layer(_TOKENS, num_layers, *placements)) / (_TOKENS * num_layers)


def share_mean(
    chain: Sequence[Compressor], mean_keep_ratio: float, num_layers: int
) -> tuple[list[Compressor], str]:
    """Give the parts without a budget the ratio at which the chain has this mean.

    Args:
        chain: In the order the parts act.
        mean_keep_ratio: In `(0, 1]`.
        num_layers: Decoder layers.

    Returns:
        The parts, all with budgets, and a remark for the report.

    Raises:
        BudgetError: The mean is out of range or cannot be reached, or every part has a budget.
    """
    check_ratio("mean_keep_ratio", mean_keep_ratio)
    open_parts = [part.takes_budget and not part.given_budget() for part in chain]
    names = ", ".join(part.name for part, free in zip(chain, open_parts, strict=True) if free)
    if not names:
        raise BudgetError(
            f"mean_keep_ratio={mean_keep_ratio} has nothing to decide: every part of the chain "
            "has a budget; leave it out of at least one"
        )

    def with_ratio(ratio: float) -> list[Compressor]:
        pairs = zip(chain, open_parts, strict=True)
        return [replace(part, keep_ratio=ratio) if free else part for part, free in pairs]

    def mean(ratio: float) -> float | None:
        """None for a ratio that a schedule cannot reach."""
        parts = with_ratio(ratio)
        for part, free in zip(parts, open_parts, strict=True):
            try:
                part.placements(num_layers)
            except BudgetError:
                if not free:
                    raise
                return None
        return chain_mean(parts, num_layers)

    low, high = 0.0, 1.0
    most = mean(high)
    assert most is not None
    if most < mean_keep_ratio - 1e-9:
        raise BudgetError(
            f"mean_keep_ratio={mean_keep_ratio} cannot be reached: the parts with a budget alone "
            f"leave {most:.3f}; ask for less, or give them more"
        )
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = mean(middle)
        low, high = (
            (low, middle) if found is not None and found >= mean_keep_ratio else (middle, high)
        )
    reached = mean(high)
    assert reached is not None
    if abs(reached - mean_keep_ratio) > 1e-6:
        raise BudgetError(
            f"mean_keep_ratio={mean_keep_ratio} cannot be reached by {names}: the least is "
            f"{reached:.3f}; ask for more, prune earlier, or give some parts budgets of their own"
        )
    return with_ratio(high), (
        f"chain: keep_ratio={high:.4g} of {names} leaves a mean of {mean_keep_ratio:g} over layers"
    )
