"""Rank the attention maps of a model's layers, and choose those that can spare tokens."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vispress.adapters.base import find_adapter
from vispress.adapters.eager import eager_attention
from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.tasks.task import Prompt
from vispress.errors import ConfigError
from vispress.methods.gamma_mod import arank


@torch.no_grad()
def mean_ranks(loaded: LoadedModel, prompts: Iterable[Prompt]) -> Float[Tensor, "L"]:
    """Average the rank of each layer's attention maps over heads and prompts (ARank).

    Prompts go through the model one by one, as padding has rows of its own. A map of N tokens costs
    N^3: some dozens of prompts of 600 tokens are minutes on a CPU for a model of 7B.

    Args:
        loaded: The model, uncompressed; it stays as it is.
        prompts: At least one.

    Raises:
        ConfigError: There is no prompt.
    """
    found: list[Tensor] = []
    with eager_attention(find_adapter(loaded.model)):
        for prompt in prompts:
            out: Any = loaded.model(
                **loaded.encode([prompt]), output_attentions=True, use_cache=False
            )
            found.append(torch.stack([arank(one[0]).mean().cpu() for one in out.attentions]))
    if not found:
        raise ConfigError("ranks are measured on prompts, and there is none")
    return torch.stack(found).mean(dim=0)


def choose_layers(
    ranks: Sequence[float], *, share: float, threshold: float | None = None
) -> tuple[int, ...]:
    """Choose the layers of the lowest rank, from the second one on; the earlier of equal ones.

    Args:
        ranks: Of each decoder layer.
        share: Of all layers but the first, rounded.
        threshold: In place of it: every layer of a lower rank.

    Raises:
        ConfigError: No layer is left.
    """
    order = sorted(range(1, len(ranks)), key=ranks.__getitem__)
    if threshold is None:
        chosen = order[: round(share * len(order))]
    else:
        chosen = [layer for layer in order if ranks[layer] < threshold]
    if not chosen:
        told = f"share={share}" if threshold is None else f"threshold={threshold}"
        lowest = min(ranks[1:], default=0.0)
        raise ConfigError(f"no layer is chosen by {told}; the lowest rank is {lowest:.1f}")
    return tuple(sorted(chosen))
