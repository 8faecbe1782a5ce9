"""Decoders that the runtime would get wrong are refused by looking at every layer."""

from types import SimpleNamespace
from typing import Any

import pytest
from tests.laws.windows import windowed
from tests.tiny import build

from vispress import compress_model
from vispress.adapters.base import find_adapter
from vispress.adapters.decoder import CHUNKED, FULL, SLIDING, layer_types, window_of
from vispress.errors import UnsupportedModelError

DECODERS: dict[str, tuple[dict[str, Any], str]] = {
    "linear attention": (
        {
            "model_type": "qwen3_next",
            "layer_types": ["full_attention", "linear_attention"],
            "num_experts": 0,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        r"layer 1 \(Qwen3NextDecoderLayer\) has no self_attn",
    ),
    "convolutions": ({"model_type": "lfm2", "full_attn_idxs": [1]}, "has no input_layernorm"),
    # its tables are complex numbers and its layers have no `mlp`: chunks of other models work
    "chunks of Llama 4": (
        {"model_type": "llama4_text", "num_local_experts": 2, "intermediate_size_mlp": 48},
        "has no mlp",
    ),
}


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_with_other_layers_are_refused_by_name(kind: str) -> None:
    text, message = DECODERS[kind]
    model = build("llava", layers=2, text=text)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        compress_model(model, "divprune", keep_ratio=0.5)
    assert "full, sliding-window or chunked attention" in str(caught.value)


SETTINGS: dict[str, tuple[Any, str]] = {
    "layer_types": (["full_attention"] * 2 + ["mamba"], "decoder layer 2 is 'mamba'"),
    "num_kv_shared_layers": (1, "last 1 layers use keys and values of earlier ones"),
    "use_bidirectional_attention": (True, "use_bidirectional_attention=True: text must be causal"),
    "is_causal": (False, "is_causal=False: text must be causal"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_a_decoder_are_refused_by_name(setting: str) -> None:
    model = build("llava", layers=3)
    value, message = SETTINGS[setting]
    setattr(model.model.language_model.config, setting, value)
    with pytest.raises(UnsupportedModelError, match=message):
        find_adapter(model)


def test_image_tokens_that_see_each_other_are_no_reason_to_refuse() -> None:
    model = build("llava", layers=1)
    model.model.language_model.config.use_bidirectional_attention = "vision"
    assert find_adapter(model).layer_types == (FULL,)


def test_every_layer_is_named() -> None:
    model = build("llava", layers=3)
    model.model.language_model.config.layer_types = ["full_attention"]
    with pytest.raises(UnsupportedModelError, match="names 1 of 3 decoder layers"):
        find_adapter(model)


def test_kinds_of_layers_and_their_windows() -> None:
    assert find_adapter(windowed("mistral", 20)).layer_types == (SLIDING,) * 6
    assert find_adapter(windowed("qwen2", 20)).layer_types == (FULL,) * 3 + (SLIDING,) * 3
    assert find_adapter(windowed("gpt_oss", 20)).layer_types == (SLIDING, FULL) * 3
    chunked = SimpleNamespace(sliding_window=None, attention_chunk_size=12)
    assert layer_types(chunked, 2) == (CHUNKED,) * 2
    assert window_of(chunked, CHUNKED) == 12
    assert window_of(chunked, FULL) is None
    assert window_of(windowed("mistral", 20).config.get_text_config(), SLIDING) == 20
