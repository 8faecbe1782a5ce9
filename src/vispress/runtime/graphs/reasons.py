"""Say why a call cannot be run from a graph; it then runs as it would have."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from vispress.runtime.forward.owner import amid_chunks
from vispress.runtime.forward.rehearsal import is_supervised


def why_not(owner: nn.Module, weights: Sequence[Tensor], given: Mapping[str, Any]) -> str | None:
    """Say what of a call no graph has; None where nothing speaks against one.

    Args:
        owner: The head that is called.
        weights: Its parameters.
        given: Keyword arguments of its forward.
    """
    config: Any = owner.config
    ids = given.get("input_ids")
    maps = given.get("output_attentions")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or given.get("inputs_embeds") is not None:
        return "it is called with embeddings, not with input_ids"
    if owner.training:
        return "the model is in training mode; call model.eval()"
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        return "gradients are on; call it under torch.no_grad() or torch.inference_mode()"
    if given.get("labels") is not None or is_supervised():
        return "labels are given, and a loss is computed"
    if config.get_text_config().output_attentions if maps is None else maps:
        return "output_attentions is on"
    if torch.is_autocast_enabled(ids.device.type):
        return "autocast is on; load the model in the dtype that it is to run in"
    if given.get("prompt_lengths") is not None:
        return "prompt_lengths are given as a keyword; use the block vispress.prompt_lengths"
    if ids.device != weights[0].device:
        return f"input_ids are on {ids.device}, and the model is on {weights[0].device}"
    return None


def why_no_prefill(given: Mapping[str, Any], cache: Any) -> str | None:
    """Say why a call of several tokens is no prefill that can be recorded.

    Args:
        given: Its keyword arguments.
        cache: Its KV cache, or None.
    """
    if has_features(given):
        return "features of its pictures are given, not the pictures"
    if isinstance(given.get("attention_mask"), dict):
        return "attention_mask is a dictionary of masks"
    if cache is None:
        return None
    if type(cache) not in (DynamicCache, StaticCache) or getattr(cache, "offloading", False):
        return f"its KV cache is a {type(cache).__name__}; use DynamicCache or StaticCache"
    return None if is_empty(cache) else "its KV cache is not empty, or was used before"


def why_no_text(base: nn.Module) -> str | None:
    """Say why a text that comes to a compressed model is not the whole of a prompt.

    Args:
        base: The base model.
    """
    return "generate prefills its prompt in chunks" if amid_chunks(base) else None


def why_no_key(plain: Mapping[str, Any]) -> str | None:
    """Say which argument keeps a call from having a key."""
    for name, value in plain.items():
        try:
            hash(value)
        except TypeError:
            return f"{name} is a {type(value).__name__}"
    return None


def has_features(given: Mapping[str, Any]) -> bool:
    """Whether features of pictures are handed in, computed ahead."""
    features = given.get("mm_encoder_outputs") or {}
    return any(one is not None for one in features.values())


def is_empty(cache: Cache) -> bool:
    """Whether nothing was ever stored in a cache."""
    return not any(layer.is_initialized for layer in cache.layers)
