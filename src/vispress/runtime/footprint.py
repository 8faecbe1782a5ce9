"""Say on which modules the hooks of a plan sit: plans with the same footprint share them."""

from collections.abc import Sequence
from dataclasses import dataclass

from vispress.kinds import Signal
from vispress.runtime.plan.plan import Plan
from vispress.runtime.stages.base import RuntimeStage


@dataclass(frozen=True)
class Footprint:
    """Name what is hooked for some plans and not for others; equal by value.

    Args:
        watched: Decoder layers whose attention is handed the call that runs.
        left: Decoder layers whose output changes.
        gated: Decoder layers in which what the MLP adds may be scaled.
        fed: Decoder layers whose MLP may be computed by a stage.
        measured: Decoder layers whose attention and MLP are measured.
        encoder: Encoder layers whose attention is watched.
        signals: What is read of the encoder elsewhere.
        installs: Places, in the order of stages, of those that put in hooks of their own.
    """

    watched: frozenset[int]
    left: frozenset[int]
    gated: frozenset[int]
    fed: frozenset[int]
    measured: frozenset[int]
    encoder: frozenset[int]
    signals: frozenset[Signal]
    installs: frozenset[int]

    @classmethod
    def of(cls, plan: Plan, stages: Sequence[RuntimeStage]) -> "Footprint":
        """Work out the footprint of a plan and its stages."""
        none = frozenset[int]()
        left = none.union(*(stage.left_layers for stage in stages))
        measured = none.union(*(bound.placement.transitions for bound in plan.placements))
        watched = none.union(*(stage.watched_layers for stage in stages))
        fed = none.union(*(stage.mlp_layers for stage in stages))
        return cls(
            watched=watched | measured | left | fed,
            left=left,
            gated=none.union(*(stage.gated_layers for stage in stages)),
            fed=fed,
            measured=measured,
            encoder=frozenset(plan.all_encoder_layers) | plan.key_layers,
            signals=plan.encoder_signals & {Signal.VISION_FEATURES, Signal.PADDING},
            installs=frozenset(stage.order for stage in stages if stage.install is not None),
        )
