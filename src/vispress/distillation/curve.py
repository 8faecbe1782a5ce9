"""How a training went."""

from dataclasses import dataclass, field


@dataclass(eq=False)
class Curve:
    """How training went.

    Args:
        loss: Of each step's batch.
        held_out: On what was held out: before the first step and behind the last.
    """

    loss: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
