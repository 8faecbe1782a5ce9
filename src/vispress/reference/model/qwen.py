"""The second reference architecture: a small Qwen2.5-VL, configured and initialised here.

Patches of 6 pixels, 2 x 2 merged: a picture of 96 x 96 becomes 8 x 8 = 64 visual tokens. Blocks
attend in windows of 4 x 4 tokens but for two; there is no [CLS] and no table of positions, and
positions in the language model are M-RoPE's.
"""

import math
from functools import cache, partial
from typing import Final

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLRMSNorm,
    Qwen2_5_VLVisionBlock,
)

from vispress.reference.model.llava import TEXT_WIDTH, initialised
from vispress.reference.world.words import BOS, EOS, IMAGE, PAD, VIDEO, VOCABULARY

PATCH: Final = 6
MERGE: Final = 2
TOKEN: Final = PATCH * MERGE  # pixels along a visual token
WINDOW: Final = 4  # tokens along a window
VISION_WIDTH: Final = 128
HEAD: Final = 32

# of clips: a temporal patch of two frames is a second, as whole as older transformers make it
FPS: Final = 2
TOKENS_PER_SECOND: Final = 1  # positions of M-RoPE

VISION_START: Final = "<vision>"
VISION_END: Final = "</vision>"
SPECIAL: Final = (VISION_START, VISION_END, VIDEO)
QWEN_VOCABULARY: Final[tuple[str, ...]] = (*VOCABULARY, *SPECIAL)
QWEN_ID: Final[dict[str, int]] = {word: index for index, word in enumerate(QWEN_VOCABULARY)}


def qwen_config(*, vision_layers: int = 5, text_layers: int = 6) -> Qwen2_5_VLConfig:
    """Make the configuration of the shipped model.

    Args:
        vision_layers: Blocks of the vision encoder; the last and the one two before it attend to
            the whole picture, the others within windows.
        text_layers: Decoder layers.

    Returns:
        A complete configuration; nothing is read from disk or network.
    """
    vision = {
        "depth": vision_layers,
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 2 * VISION_WIDTH,
        "num_heads": VISION_WIDTH // HEAD,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "tokens_per_second": TOKENS_PER_SECOND,
        "window_size": WINDOW * TOKEN,
        "fullatt_block_indexes": sorted({max(0, vision_layers - 3), vision_layers - 1}),
        "out_hidden_size": TEXT_WIDTH,
        # few positions: with Qwen's base most frequencies would stand still
        "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    }
    text = {
        "vocab_size": len(QWEN_VOCABULARY),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": text_layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 1024,
        # rows and columns have the slower frequencies, and only about ten places to tell apart
        "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 6, 6]},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "pad_token_id": QWEN_ID[PAD],
        "bos_token_id": QWEN_ID[BOS],
        "eos_token_id": QWEN_ID[EOS],
    }
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=QWEN_ID[IMAGE],
        video_token_id=QWEN_ID[VIDEO],
        vision_start_token_id=QWEN_ID[VISION_START],
        vision_end_token_id=QWEN_ID[VISION_END],
        tie_word_embeddings=True,
    )


def build_qwen(config: Qwen2_5_VLConfig, *, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Build and initialise a model in fp32 with SDPA attention, as the LLaVA is.

    Args:
        config: As from `qwen_config`.
        seed: Seed of the initialisation; the global RNG is left as it was.

    Returns:
        The model in train mode, with its generation config set.
    """
    make = partial(Qwen2_5_VLForConditionalGeneration, config)
    return initialised(make, _initialise, QWEN_ID, seed=seed)


@torch.no_grad()
def _initialise(name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
    """Set normal weights of std `1 / sqrt(fan_in)`, halved where they end in a residual stream."""
    if parameter.ndim < 2:
        if name.endswith("bias"):
            parameter.zero_()
        return
    if "embed_tokens" in name:
        std = 1 / math.sqrt(parameter.shape[1])
    else:
        std = 1 / math.sqrt(parameter[0].numel())
        if "patch_embed" in name:
            std *= 2  # pixels are small, and no norm follows
        elif name.endswith(("attn.proj.weight", "o_proj.weight", "down_proj.weight")):
            std /= 2
    parameter.normal_(std=std, generator=generator)


def encode_qwen(model: Qwen2_5_VLForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Compute the visual tokens of a batch of square pictures, as `get_image_features` does.

    All windows of a batch go through attention at once; windows that the picture's edge cuts are
    filled up, and the filling is masked.

    Args:
        model: The model.
        pixels: uint8, shape (B, S, S, 3); S is a multiple of 12.

    Returns:
        Visual tokens in raster order, shape (B, (S / 12)**2, D).
    """
    weight = model.model.visual.patch_embed.proj.weight.sum(2)  # a picture is two equal frames
    return _encode(model, _embed(pixels, weight), pixels.shape[1] // TOKEN)


def encode_clips(model: Qwen2_5_VLForConditionalGeneration, frames: Tensor) -> Tensor:
    """Compute the visual tokens of a batch of clips, as `get_video_features` does.

    Two frames make one step; steps do not see each other in the encoder.

    Args:
        model: The model.
        frames: uint8, shape (B, F, S, S, 3); F is even, S a multiple of 12.

    Returns:
        Visual tokens, step by step in raster order, shape (B, F / 2 * (S / 12)**2, D).
    """
    steps = torch.unflatten(frames, 1, (-1, 2)).flatten(0, 1)
    weight = model.model.visual.patch_embed.proj.weight
    x = _embed(steps[:, 0], weight[:, :, 0]) + _embed(steps[:, 1], weight[:, :, 1])
    return _encode(model, x, frames.shape[2] // TOKEN).view(len(frames), -1, TEXT_WIDTH)


def _embed(pixels: Tensor, weight: Tensor) -> Tensor:
    """Embed patches of uint8 pixels (B, S, S, 3) by weights (Dv, 3, P, P): (B, N, Dv)."""
    patches = _patches(pixels, -(-pixels.shape[1] // TOKEN // WINDOW))
    return nn.functional.linear(patches, weight.flatten(1))


def _encode(model: Qwen2_5_VLForConditionalGeneration, x: Tensor, side: int) -> Tensor:
    """Run blocks and merger over embedded patches (B, N, Dv) of pictures of `side`**2 tokens."""
    across = -(-side // WINDOW)
    visual = model.model.visual
    places, bias, raster = _layout(side)
    rope = visual.rotary_pos_emb(x, places.to(x.device))
    kind = x.device.type
    low = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if low else x.dtype
    cos, sin = (r[:, None].to(x.device, dtype) for r in rope)
    mask = None if bias is None else bias.to(x.device)
    for index, block in enumerate(visual.blocks):
        windows = 1 if index in visual.fullatt_block_indexes else across**2
        x = _block(block, x, cos, sin, mask, windows)
    tokens: Tensor = visual.merger(x).view(len(x), -1, TEXT_WIDTH)
    return tokens[:, raster.to(x.device)]


def _patches(pixels: Tensor, across: int) -> Tensor:
    """Cut uint8 (B, S, S, 3) into (B, N, 108): by window, token, patch; N counts the filling."""
    whole = across * WINDOW * TOKEN
    x = pixels.float().div_(127.5).sub_(1.0)
    gap = whole - pixels.shape[1]
    x = nn.functional.pad(x, (0, 0, 0, gap, 0, gap))
    axes = (across, WINDOW, MERGE, PATCH)
    x = x.view(len(x), *axes, *axes, 3)
    # B, (window, token, patch) rows and columns in turn, then channels and pixels
    return x.permute(0, 1, 5, 2, 6, 3, 7, 9, 4, 8).reshape(len(x), -1, 3 * PATCH**2)


@cache
def _layout(side: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Find how `_patches` lays out a picture of `side` x `side` tokens.

    Returns:
        Row and column of each patch, (N, 2); what to add to scores of each as a key, (N,), or None
        where nothing is filled up; and where each token of the raster is, (side**2,).
    """
    across = -(-side // WINDOW)
    whole = across * WINDOW * MERGE
    rows, columns = torch.meshgrid(torch.arange(whole), torch.arange(whole), indexing="ij")
    axes = (across, WINDOW, MERGE)
    places = torch.stack([rows, columns], -1).view(*axes, *axes, 2)
    places = places.permute(0, 3, 1, 4, 2, 5, 6).reshape(-1, 2)
    inside = (places < side * MERGE).all(-1)
    bias = torch.zeros(len(places)).masked_fill_(~inside, -1e30)
    token = places[:: MERGE**2] // MERGE
    at = torch.full((side * side,), -1)
    kept = inside[:: MERGE**2]
    at[token[kept, 0] * side + token[kept, 1]] = kept.nonzero().flatten()
    return places, None if inside.all() else bias, at


def _block(
    block: Qwen2_5_VLVisionBlock,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    windows: int,
) -> Tensor:
    """Run one block over (B, N, Dv); the N patches are `windows` equal groups that do not mix."""
    attention = block.attn
    qkv = attention.qkv(_norm(block.norm1, x)).unflatten(-1, (3, attention.num_heads, -1))
    qk, v = qkv[:, :, :2], qkv[:, :, 2]
    half = qk.shape[-1] // 2
    turned = torch.cat([-qk[..., half:], qk[..., :half]], dim=-1)
    qk = qk * cos[:, None] + turned * sin[:, None]
    q, k, v = (
        t.unflatten(1, (windows, -1)).flatten(0, 1).transpose(1, 2).contiguous()
        for t in (qk[:, :, 0] * attention.scaling, qk[:, :, 1], v)
    )
    scores = q @ k.mT  # [B * windows, heads, N / windows, N / windows]
    if mask is not None:
        keys = mask.to(scores.dtype).view(windows, 1, 1, -1).repeat(len(x), 1, 1, 1)
        scores = scores + keys
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(*x.shape)
    x = x + attention.proj(mixed)
    out: Tensor = x + block.mlp(_norm(block.norm2, x))
    return out


def _norm(norm: Qwen2_5_VLRMSNorm, x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.variance_epsilon)
