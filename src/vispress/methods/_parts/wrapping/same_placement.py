"""Whether several methods act once, at one place, and ask for the same to be shown there."""

from collections.abc import Sequence
from dataclasses import fields, replace

from vispress.budget import Budget
from vispress.errors import ConfigError
from vispress.types import Placement


def check_same_placement(names: Sequence[str], placements: Sequence[Sequence[Placement]]) -> None:
    """Refuse methods whose placements differ in more than counts and what is measured on the way.

    Args:
        names: Of the methods.
        placements: Of each.

    Raises:
        ConfigError: One acts more than once, or two act or read elsewhere or otherwise.
    """
    places = {
        replace(place, budget=Budget(keep_ratio=1.0), adaptive=False, transitions=())
        for own in placements
        for place in own
    }
    if len(places) == 1 and all(len(own) == 1 for own in placements):
        return
    got = ", ".join(
        f"{name} before layer {', '.join(str(place.layer) for place in own)}"
        for name, own in zip(names, placements, strict=True)
    )
    differ = [f.name for f in fields(Placement) if len({getattr(p, f.name) for p in places}) > 1]
    raise ConfigError(
        "parts of an ensemble act once, at one place, and are shown the same attention; "
        f"got {got}" + (f" (they differ in {', '.join(differ)})" if differ else "")
    )
