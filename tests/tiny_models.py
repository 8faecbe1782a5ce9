"""Tiny random multimodal models, built from configs only (no hub): seven, and `families`."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf
from torch import nn

# models this small run ten times slower when threads wait for each other
torch.set_num_threads(1)

FAMILIES: tuple[str, ...] = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
)
QWEN: tuple[str, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
VIDEO: tuple[str, ...] = ("llava_onevision", *QWEN)
"""Families that read videos."""

VOCAB, PAD, TEXT_IDS = 128, 0, (3, 120)
IMAGE_ID, VIDEO_ID, VISION_START, VISION_END = 120, 121, 122, 123
HIDDEN, PATCH, MERGE = 64, 4, 2
_FREE = ("class_embedding", "image_newline", "cls_token", "position_embeddings")
"""Parameters drawn at unit scale."""


def _text_config(family: str, layers: int) -> dict[str, Any]:
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family in QWEN:
        rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]}
        if family == "qwen3_vl":
            rope["mrope_interleaved"] = True
        return common | {"rope_parameters": rope}
    model_type = "llama" if family in ("llava", "llava_next") else "qwen2"
    rope = {"rope_type": "default", "rope_theta": 1000.0}
    return common | {"model_type": model_type, "rope_parameters": rope}


def _vision_config(family: str) -> dict[str, Any]:
    if family in QWEN:
        common: dict[str, Any] = {"depth": 4, "num_heads": 4, "patch_size": PATCH, "in_channels": 3}
        common |= {"spatial_merge_size": MERGE, "temporal_patch_size": 2}
        if family == "qwen2_vl":
            return common | {"embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2}
        common |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": HIDDEN}
        if family == "qwen2_5_vl":
            # windows of 2 x 2 merged tokens, so that images of odd sizes have cut ones
            return common | {"window_size": 16, "fullatt_block_indexes": [1, 3]}
        return common | {"num_position_embeddings": 36, "deepstack_visual_indexes": [1, 2]}
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    common |= {"num_attention_heads": 4, "patch_size": PATCH, "num_channels": 3}
    match family:
        case "llava":
            return common | {"model_type": "clip_vision_model", "image_size": 24}
        case "llava_next":
            return common | {"model_type": "clip_vision_model", "image_size": 16}
        case "llava_onevision":
            # 5 x 5 patches: pooling videos to 3 x 3 interpolates, as 27 -> 14 does in checkpoints
            extra = {"model_type": "siglip_vision_model", "image_size": 20}
            return common | extra | {"vision_use_head": False}
        case "internvl":
            return common | {"image_size": [32, 32], "patch_size": [PATCH, PATCH]}
    raise ValueError(f"unknown family {family!r}; known: {FAMILIES}")


_PINPOINTS = {
    "llava_next": [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]],
    # the last one exceeds nine crops, so that packing interpolates
    "llava_onevision": [[20, 20], [20, 40], [40, 20], [40, 40], [20, 60], [60, 20], [80, 80]],
}
_CLASSES: dict[str, tuple[str, str]] = {
    "llava": ("LlavaConfig", "LlavaForConditionalGeneration"),
    "llava_next": ("LlavaNextConfig", "LlavaNextForConditionalGeneration"),
    "llava_onevision": ("LlavaOnevisionConfig", "LlavaOnevisionForConditionalGeneration"),
    "qwen2_vl": ("Qwen2VLConfig", "Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration"),
    "internvl": ("InternVLConfig", "InternVLForConditionalGeneration"),
}

WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3},
    "gpt_oss": {"model_type": "gpt_oss", "num_local_experts": 2, "num_experts_per_tok": 1},
    "gemma3": {"sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
}
"""Language models with `sliding_window`: in all layers, in the last ones, in every other one."""


def build(
    family: str,
    *,
    dtype: torch.dtype = torch.float64,
    attn: str = "sdpa",
    seed: int = 0,
    layers: int = 6,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
) -> Any:
    """A random `ForConditionalGeneration` model in eval mode.

    Weights are strong enough that logits have a standard deviation of 5 to 10 and attention is far
    from uniform. `generate` never stops early (no eos token) and never draws a placeholder.

    Args:
        family: One of `FAMILIES` or of `tests.families.NEWER`.
        dtype: Of all weights.
        attn: Attention implementation.
        seed: Of the weights.
        layers: Decoder layers.
        text: Settings of the language model in place of the family's (`WINDOWED` has some).
        vision: Settings of the vision encoder in place of the family's.
    """
    from tests.families import TABLE  # whose files read what is above

    if family in TABLE:
        config = _config_of(TABLE[family], layers, dict(text or {}), dict(vision or {}))
        return _made(config, f"{TABLE[family].model}ForConditionalGeneration", dtype, attn, seed)
    config_class, model_class = _CLASSES[family]
    ids = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    special = {"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID} | ids
    if family.startswith("llava"):
        special = {"image_token_index": IMAGE_ID}
        if family == "llava_onevision":
            special["video_token_index"] = VIDEO_ID
    elif family == "internvl":
        special = {"image_token_id": IMAGE_ID}
    if family in _PINPOINTS:
        special["image_grid_pinpoints"] = _PINPOINTS[family]
    config = getattr(hf, config_class)(
        text_config=_text_config(family, layers) | dict(text or {}),
        vision_config=_vision_config(family) | dict(vision or {}),
        tie_word_embeddings=False,
        **special,
    )
    return _made(config, model_class, dtype, attn, seed)


def _config_of(family: Any, layers: int, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    """The configuration of a `tests.families.Family`."""
    special = dict(zip(family.ids, (IMAGE_ID, VIDEO_ID), strict=False)) | dict(family.special)
    if family.like in QWEN:
        special |= {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    if family.like in _PINPOINTS:
        special.setdefault("image_grid_pinpoints", _PINPOINTS[family.like])
    of_like = {} if family.own else _vision_config(family.like)
    return getattr(hf, f"{family.model}Config")(
        text_config=_text_config(family.like, layers) | dict(family.text(layers)) | text,
        vision_config=of_like | dict(family.vision) | vision,
        tie_word_embeddings=False,
        **special,
    )


def _made(config: Any, model_class: str, dtype: torch.dtype, attn: str, seed: int) -> Any:
    """A model of a configuration, with weights of a seed."""
    # grouped products of experts take no fp64
    ways = {"attn_implementation": attn, "experts_implementation": "eager"}
    model = getattr(hf, model_class)._from_config(config, **ways)
    _randomise(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


@torch.no_grad()
def _randomise(model: Any, seed: int) -> None:
    """Draw all weights in fp32, so that models of several dtypes are the same model."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            noise *= 0.2
        elif name == "lm_head.weight":
            noise *= 6 / HIDDEN**0.5
        elif id(parameter) in embeddings or name.endswith(_FREE):
            pass
        elif name.endswith("A_log"):  # states last for some ten tokens
            noise = 0.5 * noise - 3
        elif parameter.dim() == 1:
            # norms and layer scales; Qwen3 normalises q and k, so its attention is sharpened here
            noise = (1.4 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1) + 0.2 * noise
        else:
            sharp = 1.4 if any(s in name for s in ("q_proj", "k_proj", "qkv")) else 1.0
            noise *= sharp / parameter[0].numel() ** 0.5
        parameter.copy_(noise)
    # a generated placeholder would be taken for an image by whoever reads the ids afterwards
    head = model.get_output_embeddings().weight
    head[[PAD, IMAGE_ID, VIDEO_ID, VISION_START, VISION_END]] = 0
