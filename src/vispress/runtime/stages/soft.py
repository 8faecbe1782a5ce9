"""Let tokens count less, in training, that would be dropped: `TokenPlan.soft` of keys.

All rows stay. In every layer from the placement's on, the log of what a token counts joins the
attention logits of its key, for all queries, on top of the model's own mask. Outside of training
the tokens are dropped (`stages.select`). What softens features needs nothing here: these are new
values of the tokens.
"""

from functools import partial

from torch import Tensor

from vispress.errors import ConfigError, UnsupportedModelError
from vispress.runtime.forward.running import refuse_reentrant
from vispress.runtime.forward.state import ForwardState
from vispress.runtime.kv_cache.hf_compat import CACHE
from vispress.runtime.stages.base import Binding, RuntimeStage, StageCall, Watched
from vispress.runtime.tokens import masks
from vispress.types import Stage

DROPS = (Stage.PRE_LLM, Stage.IN_LLM)


def bind(binding: Binding) -> RuntimeStage | None:
    """Make the stage of a chain with a method that softens keys.

    Raises:
        ConfigError: It acts where nothing is dropped.
    """
    own = [bound for bound in binding.placements if bound.method.softens]
    for bound in own:
        if bound.placement.stage not in DROPS:
            raise ConfigError(
                f"{bound.method.name} softens what it drops in training, and so acts at stages "
                f"pre_llm and in_llm alone; it has a placement at {bound.placement.stage.value!r}"
            )
    first = [bound.placement.layer for bound in own if bound.method.softens == "keys"]
    if not first:
        return None
    layers = frozenset(range(min(first), len(binding.adapter.decoder_layers)))
    return RuntimeStage(carries=frozenset(), open=_open, order=45, watched_layers=layers)


def _open(state: ForwardState) -> StageCall | None:
    if not state.trains or not state.images:
        return None
    names = " and ".join(m.name for m in state.plan.methods if m.softens == "keys")
    implementation = state.plan.implementation
    if masks.check_implementation(implementation) == "flash":
        raise UnsupportedModelError(
            f"{names} adds to attention logits in training, and {implementation!r} takes no mask "
            "that could; train with 'sdpa' or 'eager' (what is trained then runs under it)"
        )
    if state.cache is not None:
        raise ConfigError(
            f"{names} drops nothing in training, and a KV cache would show later tokens whole what "
            f"is soft; leave out {CACHE}, or call the model under torch.no_grad()"
        )
    for bound in state.plan.placements:
        if bound.placement.probe is not None:
            raise ConfigError(
                f"{bound.method.name} reads a probe, which does not see what {names} softens in "
                "training; train without it in the chain"
            )
    return StageCall(attend=partial(_attend, state))


def _attend(state: ForwardState, number: int, watched: Watched) -> Tensor | None:
    """Give the mask, with what keys lose on top."""
    bias = state.soft_at(number)
    if bias is None:
        return watched.mask
    query = watched.query
    rows = state.last if state.mode == "peek" else state.rows_at(number)
    if state.mode == "run":
        refuse_reentrant(state, "what is softened")
    own = bias.to(query.device).gather(1, rows.to(query.device).index)
    return masks.with_bias(watched.mask, own, query.shape[2], query.dtype)
