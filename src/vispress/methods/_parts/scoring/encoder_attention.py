"""Which encoder attention scores a token: the [CLS] row or, without [CLS], the column mean."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from vispress.methods.base import upcast
from vispress.types import CLS_SIGNALS, Signal, VisualTokens

Scores = Literal["cls", "column_mean"]


def attention_signals(reads: frozenset[Signal], scores: Scores) -> frozenset[Signal]:
    """Put the column mean in place of [CLS] attention if asked."""
    if scores == "cls":
        return reads
    return reads - CLS_SIGNALS | {Signal.COLUMN_ATTENTION}


def encoder_attention(tokens: VisualTokens, scores: Scores) -> Float[Tensor, "B *E N"]:
    """Average over heads in at least fp32: `[B, N]`, or `[B, E, N]` of several layers."""
    attention = tokens.cls_attention if scores == "cls" else tokens.column_attention
    assert attention is not None  # declared in `signals`
    return upcast(attention).mean(dim=-2)
