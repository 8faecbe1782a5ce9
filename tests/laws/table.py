"""The table that laws run over: every registered method on every family, and the prompts."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tests.families import TABLE
from tests.tiny import (
    FAMILIES,
    NEWER,
    QWEN,
    VIDEO,
    Image,
    Sample,
    Text,
    Video,
    build,
    gist_tokens,
    like,
    make_inputs,
    num_gist_tokens,
)
from torch import Tensor

from vispress import list_methods
from vispress.adapters.base import find_adapter
from vispress.api import plan_of
from vispress.config import make_compressor
from vispress.errors import VispressError
from vispress.methods.base import Compressor
from vispress.methods.cache_evictor import CacheEvictor
from vispress.methods.encoder_pooler import EncoderPooler
from vispress.methods.gist_evictor import GistEvictor
from vispress.methods.pair_masker import PairMasker
from vispress.registry import get_method
from vispress.request import Request
from vispress.types import CLS_SIGNALS

METHODS = tuple(list_methods())
NO_BUDGET = frozenset(name for name in METHODS if not get_method(name).takes_budget)
"""Methods that take no budget; a contract test holds them to it."""

SETTINGS: dict[str, dict[str, Any]] = {
    name: {}
    for name in (
        *sorted(NO_BUDGET),
        "adsc",
        "covipal",
        "pyramiddrop",
        "sparsevlm",
        "sparsevlm_plus",
        "transprune",
    )
}
"""What `compress_model` gets beside the name; others get a ratio."""
SETTINGS["pvc"] = {"after": (1,)}  # 6 x 6 patches are halved once

VIDEO_ONLY = frozenset(name for name in METHODS if get_method(name).needs == "video")
"""Methods that leave the images of the common batch whole; laws on videos run over them."""

# two images and one, a text-only sample, unequal lengths; sizes differ where the family allows it
SAMPLES = (
    Sample([Text(5), Image(4, 4), Text(7)]),
    Sample([Text(3)]),
    Sample([Text(2), Image(4, 6), Text(3), Image(6, 4), Text(4)]),
)
VIDEO_SAMPLES = (
    Sample([Text(3), Video(3, 4, 4), Text(6)]),
    Sample([Text(2), Video(3, 4, 6), Text(3)]),
)
VIDEO_CASES = [(family, method) for family in VIDEO for method in sorted(VIDEO_ONLY)]


@cache
def model_of(family: str, dtype: torch.dtype = torch.float64, attn: str = "sdpa") -> Any:
    """One model a family; tests must leave it as they found it."""
    return build(family, dtype=dtype, attn=attn)


def fits(family: str, method: str) -> bool:
    """Whether the family has the kind of input, encoder and LLM that the method is made for."""
    if family in NEWER and (refused(family, method) or _refused_in_calls(family, method)):
        return False
    needs, adapter = get_method(method).needs, find_adapter(model_of(family))
    if issubclass(get_method(method), EncoderPooler):
        return pools(family, method)
    return needs is None or needs in adapter.kinds


def _refused_in_calls(family: str, method: str) -> bool:
    """Whether caches of windows, or sub-pictures without gists behind them, do not take it."""
    kind, newer = get_method(method), TABLE[family]
    gists = issubclass(kind, GistEvictor)
    return (newer.split and gists) or (newer.windowed and (gists or issubclass(kind, CacheEvictor)))


@cache
def refused(family: str, method: str) -> str | None:
    """Why a method with the settings of its cases is refused on a family; None: it is not."""
    model = model_of(family)
    try:
        plan_of(model, find_adapter(model), Request((make(family, method),)))
    except VispressError as error:
        return str(error)
    return None


def pools(family: str, method: str) -> bool:
    """Whether the encoder's grid can be halved as often as the method does in its case."""
    pooler = make_compressor(method, **SETTINGS.get(method, {})).encoder_pooler()
    adapter = find_adapter(model_of(family))
    grids = adapter.encoder_grids("image", {})
    if pooler is None or grids is None:
        return False
    times = len(pooler.pooled_behind(len(adapter.encoder_blocks())))
    return not any(side % 2**times for grid in grids for side in grid)


def on_videos() -> list[tuple[str, str]]:
    """Every method on every family that takes videos."""
    return [(f, m) for f in FAMILIES if f in VIDEO for m in METHODS if fits(f, m)]


def settings(family: str, method: str, **more: Any) -> dict[str, Any]:
    """Arguments that make `method` run on `family` (with the documented [CLS] substitute)."""
    chosen = dict(SETTINGS.get(method, {"keep_ratio": 0.4})) | more
    adapter = find_adapter(model_of(family))
    if get_method(method).reads & CLS_SIGNALS and not adapter.has_cls:
        chosen["scores"] = "column_mean"
    return chosen


def make(family: str, method: str, **more: Any) -> Compressor:
    """The compressor of a case."""
    return make_compressor(method, **settings(family, method, **more))


CASES = [
    (family, method)
    for family in FAMILIES
    for method in METHODS
    if method not in VIDEO_ONLY and fits(family, method)
]

MASKING = frozenset(
    name
    for name in METHODS
    if issubclass(get_method(name), PairMasker | CacheEvictor | GistEvictor)
)
"""Methods that drop nothing from a prefill; `test_pair_masks`, `test_cache_stage` and `test_gists`
have the masked models that they equal."""
GISTS = frozenset(name for name in METHODS if issubclass(get_method(name), GistEvictor))
"""Methods whose prompts have a token behind each image; `conftest` puts it there in their cases."""
DROPPING = [case for case in CASES if case[1] not in MASKING]
BUDGETED = [case for case in CASES if case[1] not in NO_BUDGET]
"""Methods without a budget end with no token: they have no identity and take no number."""
DROPS = [name for name in METHODS if name not in MASKING]


def inputs_of(
    family: str, padding: str = "left", dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """The common batch of a family."""
    return _inputs_of(family, padding, dtype, num_gist_tokens())


@cache
def _inputs_of(family: str, padding: str, dtype: torch.dtype, gists: int) -> dict[str, Any]:
    with gist_tokens(gists):
        return make_inputs(family, SAMPLES, padding=padding, dtype=dtype)


def real_positions(family: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with position ids that do not count padding, as `generate` gives them.

    Qwen models work them out by themselves; others count padding in when they are left to it.
    """
    if like(family) in QWEN:
        return dict(inputs)
    ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return dict(inputs) | {"position_ids": ids}


def exact(family: str) -> float:
    """How far apart logits of two equal calls may be; fp32 routers of newer families round."""
    return 1e-6 if family in NEWER else 1e-9


def logits_of(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Logits of a forward without gradients."""
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[no-any-return]


def greedy(model: Any, inputs: Mapping[str, Any], new_tokens: int = 3) -> tuple[Tensor, Tensor]:
    """Sequences and the logits of every step of greedy decoding."""
    out = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits, dim=1)
