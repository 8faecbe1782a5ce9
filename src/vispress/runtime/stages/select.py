"""Drop visual tokens before the LLM or one of its layers: `Stage.PRE_LLM`, `Stage.IN_LLM`.

A placement that reads the attention of the very layer it acts before looks ahead: the layer's
queries and keys are computed once more, on the rows that are still there.
"""

from functools import partial

import torch

from vispress.runtime.forward.apply_placement import prune, unasked
from vispress.runtime.forward.attention_reads import EnoughRead, attention_layers
from vispress.runtime.forward.running import RUNNING
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.plan.bound import BoundPlacement
from vispress.runtime.stages.base import Binding, Entering, RuntimeStage, StageCall
from vispress.types import Stage

CARRIES = frozenset({Stage.PRE_LLM, Stage.IN_LLM})


def bind(binding: Binding) -> RuntimeStage | None:
    """Make the stage of a chain that drops anything."""
    placements = binding.carried_by(CARRIES)
    if not placements:
        return None
    layers = {layer for bound in placements for layer in attention_layers(bound.placement)}
    return RuntimeStage(carries=CARRIES, open=_open, order=20, watched_layers=frozenset(layers))


def _open(state: ForwardState) -> StageCall | None:
    if not state.images:
        return None
    own = [bound for bound in state.plan.placements if bound.placement.stage in CARRIES]
    return StageCall(
        before_placement=partial(_look_ahead, state),
        place=partial(prune, state),
        remarks=partial(unasked, state, own),
    )


def _look_ahead(state: ForwardState, bound: BoundPlacement, entering: Entering) -> None:
    """Read attention rows of a layer that has not run, for a placement that asks for them."""
    placement, number = bound.placement, entering.number
    if placement.queries is None or placement.attention_of != "next" or placement.layer == 0:
        return
    for read in state.reads:  # a placement before at this layer may have dropped rows
        read.seen = read.seen and not (read.mode == "peek" and read.layer == number)
    _peek(state, entering)


@torch.no_grad()
def _peek(state: ForwardState, entering: Entering) -> None:
    layer, hidden = entering.module, entering.hidden
    running = entering.kwargs[RUNNING]
    arguments = running.inputs.peek_kwargs(entering.number, hidden, entering.kwargs)
    arguments[RUNNING] = running
    state.mode, state.rotary = "peek", arguments["position_embeddings"]
    # dropout inside projections (LoRA) must not move the generators of the real run
    devices = [hidden.device] if hidden.is_cuda and layer.training else []
    try:
        with torch.random.fork_rng(devices=devices, enabled=layer.training):
            layer.self_attn(hidden_states=layer.input_layernorm(hidden), **arguments)
    except EnoughRead:
        pass
    finally:
        state.mode = "run"
