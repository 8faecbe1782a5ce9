"""Turn plans that may be soft into what a call does: in training all tokens stay and count less."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, nn

from vispress.errors import CompressionStateError
from vispress.methods.base import Compressor, upcast
from vispress.runtime.tokens.images import Bucket
from vispress.types import TokenPlan, VisualTokens, full_index

LEAST: Final = -10.0
"""Of what a placement adds to the logits of a key: a row that sees nothing else stays finite."""


def check_mode(methods: Sequence[Compressor], parameters: nn.Module | None) -> None:
    """Refuse gradients of parameters in train mode where the LLM, in eval mode, drops tokens.

    Args:
        methods: Of the model.
        parameters: Of the methods.

    Raises:
        CompressionStateError: They would be zeros, and nothing be learned.
    """
    soft = [method.name for method in methods if method.softens]
    if soft and parameters is not None and parameters.training and torch.is_grad_enabled():
        raise CompressionStateError(
            f"the parameters of {soft[0]} are in train mode, and the language model is in eval "
            "mode, in which tokens are dropped and nothing is learned; call model.train() (and set "
            "dropout to 0 to have none), model.eval(), or the model under torch.no_grad()"
        )


def softened(plan: TokenPlan, tokens: VisualTokens, method: Compressor) -> TokenPlan:
    """Give what a plan means in this call: all tokens in training, what it keeps otherwise.

    Args:
        plan: From the method, checked; soft.
        tokens: What it was made for.
        method: Says what is softened.

    Raises:
        ValueError: The method does not say so.
    """
    assert plan.soft is not None
    if method.softens is None:
        raise ValueError(f"{method.name} gives a soft plan, and says of itself softens = None")
    if not tokens.training:
        return replace(plan, soft=None)
    every = full_index(tokens.batch, tokens.num_visual, plan.soft.device)
    if method.softens == "keys":
        return replace(plan, keep=every)
    changed = upcast(tokens.features) * plan.soft.unsqueeze(-1)
    return replace(plan, keep=every, features=changed.to(tokens.features.dtype), soft=None)


def key_biases(soft: Sequence[tuple[Bucket, Tensor]], like: Tensor) -> Tensor:
    """`[B, Q]`: logs of what keys count, at least `LEAST`; 0 for other tokens (differentiable).

    Args:
        soft: Buckets and `[Bk, N]`.
        like: `[B, Q]`, for shape and device.
    """
    least = math.exp(LEAST)  # clamped first: the gradient of the log of 0 is no number
    logs = [upcast(own).clamp(min=least).log() for _, own in soft]
    whole = torch.zeros(like.shape, dtype=logs[0].dtype, device=like.device)
    for (bucket, _), own in zip(soft, logs, strict=True):
        sample = bucket.sample.unsqueeze(1).expand_as(bucket.positions)
        whole = whole.index_put((sample, bucket.positions), own.to(whole))
    return whole
