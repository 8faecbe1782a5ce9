"""The reference architecture: a small LLaVA, configured and initialised here."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from vispress.reference.world.scenes import IMAGE_SIZE, PATCH_SIZE
from vispress.reference.world.words import BOS, EOS, IMAGE, PAD, VOCABULARY, WORD_ID

Model = TypeVar("Model", bound=Any)

VISION_WIDTH: Final = 160
TEXT_WIDTH: Final = 192
MAX_NEW_TOKENS: Final = 4


def reference_config(*, vision_layers: int = 5, text_layers: int = 6) -> LlavaConfig:
    """Make the configuration of the shipped model.

    Args:
        vision_layers: Layers of the vision encoder; features come from the last but one.
        text_layers: Decoder layers.

    Returns:
        A complete configuration; nothing is read from disk or network.
    """
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=3 * VISION_WIDTH,
        num_hidden_layers=vision_layers,
        num_attention_heads=5,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=VISION_WIDTH,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=TEXT_WIDTH,
        intermediate_size=512,
        num_hidden_layers=text_layers,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=WORD_ID[PAD],
        bos_token_id=WORD_ID[BOS],
        eos_token_id=WORD_ID[EOS],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=WORD_ID[IMAGE],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=True,
        pad_token_id=WORD_ID[PAD],
        bos_token_id=WORD_ID[BOS],
        eos_token_id=WORD_ID[EOS],
    )


def build_model(config: LlavaConfig, *, seed: int) -> LlavaForConditionalGeneration:
    """Build and initialise a model in fp32 with SDPA attention.

    Weights are normal with std `1 / sqrt(fan_in)`, halved on projections back into the residual
    stream: at this size that trains clearly faster than CLIP's and Llama's defaults.

    Args:
        config: As from `reference_config`.
        seed: Seed of the initialisation; the global RNG is left as it was.

    Returns:
        The model in train mode, with its generation config set.
    """
    return initialised(
        partial(LlavaForConditionalGeneration, config), _initialise, WORD_ID, seed=seed
    )


def initialised(
    make: Callable[[], Model],
    initialise: Callable[[str, nn.Parameter, torch.Generator], None],
    ids: Mapping[str, int],
    *,
    seed: int,
) -> Model:
    """Make and initialise a model under a seed, in train mode, its generation config set.

    Args:
        make: Makes the model.
        initialise: Sets one parameter, given its name.
        ids: Token ids by word.
        seed: Seed of the initialisation; the global RNG is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = make()
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            initialise(name, parameter, generator)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
    )
    trainable: Model = model.train()
    return trainable


@torch.no_grad()
def _initialise(name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
    """Set one parameter by its role, which its name and shape tell."""
    if parameter.ndim < 2:
        if "class_embedding" in name:
            parameter.normal_(std=0.1, generator=generator)
        elif name.endswith("bias"):
            parameter.zero_()
        return
    if "position_embedding" in name:
        std = 0.1
    elif "embed_tokens" in name or "lm_head" in name:
        std = 1 / math.sqrt(parameter.shape[1])
    else:
        std = 1 / math.sqrt(parameter[0].numel())
        if name.endswith(("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight")):
            std /= 2
    parameter.normal_(std=std, generator=generator)


def encode_image(
    model: LlavaForConditionalGeneration, pixel_values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the vision encoder and the projector as `LlavaForConditionalGeneration` does.

    The last encoder layer never reaches the language model; it is run for its [CLS] only.

    Args:
        model: The model; `vision_feature_layer` must be -2.
        pixel_values: Normalised pixels, shape (B, 3, 96, 96).

    Returns:
        Projected features (B, 144, D), the [CLS] state of the feature layer (B, Dv) and the
        [CLS] state of the last layer (B, Dv).
    """
    tower = model.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    last = _cls_only(tower.encoder.layers[-1], hidden)
    features: Tensor = model.model.multi_modal_projector(hidden[:, 1:])
    return features, hidden[:, 0], last


def _cls_only(layer: CLIPEncoderLayer, hidden: Tensor) -> Tensor:
    """Evaluate one encoder layer at [CLS] only: a fifth of its cost; no gradient to its input.

    Shapes: (B, 1 + N, Dv) to (B, Dv).
    """
    hidden = hidden.detach()
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    heads = attention.num_heads
    q = attention.q_proj(normed[:, :1]).unflatten(-1, (heads, -1)).transpose(1, 2)
    k = attention.k_proj(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
    v = attention.v_proj(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
    mixed = nn.functional.scaled_dot_product_attention(q, k, v)
    cls = hidden[:, 0] + attention.out_proj(mixed.transpose(1, 2).flatten(2))[:, 0]
    out: Tensor = cls + layer.mlp(layer.layer_norm2(cls))
    return out


def normalise(pixels: Tensor) -> Tensor:
    """Convert uint8 pixels (B, 96, 96, 3) to the model's input (B, 3, 96, 96), about `[-1, 1]`."""
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
