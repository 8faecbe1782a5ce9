"""Name one placement of one compressor of a chain."""

from dataclasses import dataclass

from vispress.methods.base import Compressor
from vispress.types import Placement, Positions


@dataclass(frozen=True, eq=False)
class BoundPlacement:
    """One placement of one compressor, in the order the placements are taken.

    Args:
        number: Place in that order.
        compressor: Number of the compressor in the chain.
        method: The compressor.
        placement: Where it acts and how much it keeps.
        positions: What becomes of position ids.
    """

    number: int
    compressor: int
    method: Compressor
    placement: Placement
    positions: Positions
