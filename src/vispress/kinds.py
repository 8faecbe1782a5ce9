"""The words of the exchange: where methods act, what they read, whose attention."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal

Positions = Literal["original", "compact"]
Need = Literal["anyres", "video"]
"""Kinds of visual input that not every model has: AnyRes crops, videos."""
Evidence = Literal[
    "code", "read", "reimplementation", "paper", "reconstructed", "control", "composition", "own"
]
"""What a method follows; see `EVIDENCE`."""
EVIDENCE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "code": "numbers of its authors' (or the released) code hold in every test run, at the "
        "published setting",
        "read": "its authors' code was read, through a specification; none of its numbers is here",
        "reimplementation": "numbers of somebody else's code for it hold in every test run",
        "paper": "the paper's formulas, which say all that is needed; there is no code",
        "reconstructed": "paper or code leave something open, or need what models lack; its file "
        "says what is ours",
        "control": "no method: what methods are compared with",
        "composition": "made of other methods",
        "own": "ours",
    }
)
"""What each word promises. `code` is checked: `tests/parity` runs every method that has it on its
authors' numbers. What a model gives a method (attention, features) is the adapters', with tests of
their own; where it lacks what the code reads, the method's file says what stands in.
"""
Softens = Literal["keys", "features"]
"""What tokens lose in training that would be dropped: weight as keys, or size."""


class Stage(StrEnum):
    """Where in the model a placement acts."""

    ENCODER = "encoder"
    PRE_LLM = "pre_llm"
    IN_LLM = "in_llm"
    DECODE = "decode"
    MASK = "mask"
    SKIP = "skip"
    CACHE = "cache"
    COMPUTE = "compute"


class Signal(StrEnum):
    """What a compressor may read beside the features; declared in `Compressor.reads`."""

    CLS_ATTENTION = "cls_attention"
    CLS_LOGITS = "cls_logits"
    CLS_WIDE_ATTENTION = "cls_wide_attention"
    COLUMN_ATTENTION = "column_attention"
    PATCH_ATTENTION = "patch_attention"
    VISION_KEYS = "vision_keys"
    VISION_FEATURES = "vision_features"
    PROJECTOR = "projector"
    ENCODER_GROUPS = "encoder_groups"
    TEXT_EMBEDDINGS = "text_embeddings"
    INPUT_EMBEDDINGS = "input_embeddings"
    QUERY_ATTENTION = "query_attention"
    MEAN_ATTENTION = "mean_attention"
    KEY_NORMS = "key_norms"
    ROTARY_PRIOR = "rotary_prior"
    TEXT_STATES = "text_states"
    FINAL_NORM = "final_norm"
    INPUT_NORM = "input_norm"
    TRANSITION = "transition"
    UPDATE_NORM = "update_norm"
    GRID = "grid"
    CROPS = "crops"
    IMAGE_COUNT = "image_count"
    IMAGE_NUMBER = "image_number"
    PADDING = "padding"
    CONTEXT = "context"
    DEPTH = "depth"


CLS_SIGNALS = frozenset({Signal.CLS_ATTENTION, Signal.CLS_LOGITS, Signal.CLS_WIDE_ATTENTION})
"""What only an encoder with a [CLS] token gives."""
ATTENTION_SIGNALS = CLS_SIGNALS | {Signal.COLUMN_ATTENTION, Signal.PATCH_ATTENTION}
"""What is read of the encoder's attention."""
ENCODER_SIGNALS = ATTENTION_SIGNALS | {
    Signal.VISION_KEYS,
    Signal.VISION_FEATURES,
    Signal.PADDING,
}
"""What is read while the encoder runs."""
PROMPT_SIGNALS = frozenset(
    {
        Signal.TEXT_EMBEDDINGS,
        Signal.TEXT_STATES,
        Signal.KEY_NORMS,
        Signal.TRANSITION,
        Signal.CONTEXT,
    }
)
"""What is read of the text around an image."""


class Queries(StrEnum):
    """Whose attention rows `query_attention` holds."""

    LAST = "last"
    """The last token of the prompt that the image stands in: Q = 1.

    A prompt ends before the first supervised token behind the image, where labels are given; at the
    prompt length, where one is known; else with the last valid token.
    """
    ENDS = "ends"
    """As `LAST`, and with labels the token before each later supervised run of the document, too:
    Q = their count."""
    LAST_FOUR = "last_four"
    """The last four of `TEXT_AFTER`, or all there are; as `LAST` where there are none."""
    TEXT_AFTER = "text_after"
    """All non-visual tokens of the prompt behind the image's last token: Q = their count."""
    AFTER = "after"
    """All tokens of the prompt behind the image's last token, other images too, and that token
    itself where there are none; for `mean_attention` alone, as they are many.
    """
    ALL = "all"
    """The mean over all tokens of the prompt that the layer runs on, visual ones too: Q = 1."""
