"""Visual tokens of a vision encoder alone: methods can be seen on photographs without an LLM.

The encoder's own features stand for projected ones. Methods that read an LLM, a question or a
projector's weights are refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from vispress.errors import CheckpointError, UnsupportedMethodError
from vispress.methods.base import Compressor
from vispress.model_folders import check_folder, load_part, read_settings
from vispress.report import ImageReport, PlacementReport
from vispress.types import Signal, Stage, VisualTokens, full_index

_MEAN: Final = (0.485, 0.456, 0.406)
_STD: Final = (0.229, 0.224, 0.225)
_KEYS: Final = ("k_proj", "key")
_ALWAYS: Final = frozenset(
    {Signal.COLUMN_ATTENTION, Signal.VISION_FEATURES, Signal.GRID, Signal.CROPS}
)
_WITH_CLS: Final = frozenset({Signal.CLS_ATTENTION, Signal.CLS_LOGITS})


@dataclass(frozen=True)
class Encoder:
    """A vision encoder.

    Args:
        name: Its folder.
        model: In eval mode, with eager attention.
        side: Pixels of a picture's side.
        mean: Of its preprocessing, by channel.
        std: Likewise.
    """

    name: str
    model: Any
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def see(self, picture: Image.Image) -> tuple[VisualTokens, NDArray[np.float64]]:
        """Encode a picture, squeezed to a square.

        Returns:
            Its tokens with the encoder's signals, and what was seen: `[H, W, 3]` in `[0, 1]`.
        """
        small = picture.convert("RGB").resize((self.side, self.side), Image.Resampling.BICUBIC)
        seen = np.asarray(small, dtype=np.float64) / 255
        pixels = (seen - np.asarray(self.mean)) / np.asarray(self.std)
        values = torch.from_numpy(pixels).float().permute(2, 0, 1)[None]
        return _tokens(self.model, values), seen


def load_encoder(folder: Path, side: int | None = None) -> Encoder:
    """Load a vision encoder (DINOv2, CLIP, SigLIP) from a folder of Hugging Face.

    Args:
        folder: With config.json, model.safetensors and perhaps preprocessor_config.json.
        side: Pixels of a picture's side, where not the encoder's own; positions are interpolated.

    Raises:
        CheckpointError: Something is missing, damaged, or no encoder of squares and patches.
    """
    from transformers import AutoModel

    what = f"the encoder {folder}"
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{what} has no config.json: it is no Hugging Face checkpoint")
    check_folder(folder, what)
    model = load_part(AutoModel, folder, what, attn_implementation="eager").eval()
    model = getattr(model, "vision_model", model)
    if not hasattr(model.config, "patch_size") or not hasattr(model.config, "image_size"):
        raise CheckpointError(f"{what} ({model.config.model_type}) is no encoder of patches")
    path = folder / "preprocessor_config.json"
    settings: Mapping[str, Any] = read_settings(path, what) if path.is_file() else {}
    mean = tuple(settings.get("image_mean", _MEAN))
    std = tuple(settings.get("image_std", _STD))
    return Encoder(str(folder), model, side or model.config.image_size, mean, std)


@torch.inference_mode()
def _tokens(model: Any, pixels: Tensor) -> VisualTokens:
    keys: list[Tensor] = []
    modules = [m for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in _KEYS]
    hooks = [
        last.register_forward_hook(lambda *call: keys.append(call[-1])) for last in modules[-1:]
    ]
    options: dict[str, Any] = {"output_attentions": True}
    if pixels.shape[-1] != model.config.image_size and model.config.model_type != "dinov2":
        options["interpolate_pos_encoding"] = True
    try:
        out = model(pixels, **options)
    finally:
        for hook in hooks:
            hook.remove()
    rows = pixels.shape[-1] // model.config.patch_size
    count, length = rows * rows, out.last_hidden_state.shape[1]
    first = length - count  # [CLS] and registers stand in front
    features, attention = out.last_hidden_state[:, first:], out.attentions[-1]
    heads = attention.shape[1]
    by_head = [key[:, first:].reshape(1, count, heads, -1) for key in keys]
    return VisualTokens(
        features=features,
        index=full_index(1, count, features.device),
        num_original=count,
        grid=(1, rows, rows),
        vision_features=features,
        projector=nn.Identity(),
        column_attention=attention.mean(dim=2)[..., first:],
        cls_attention=attention[:, :, 0, first:] if first else None,
        cls_logits=attention[:, :, 0, first:].log() if first else None,
        vision_keys=by_head[0].transpose(1, 2) if by_head else None,
        image_count=torch.ones(1, dtype=torch.int64),
        image_number=torch.zeros(1, dtype=torch.int64),
        num_entered=count,
    )


def choose(method: Compressor, tokens: VisualTokens) -> ImageReport:
    """Let a method choose among a picture's tokens.

    Args:
        method: With a budget; one that acts before the LLM, by what the encoder gives.
        tokens: From `Encoder.see`.

    Returns:
        What was kept, as a report has it.

    Raises:
        UnsupportedMethodError: It acts elsewhere, or reads what an encoder alone cannot give.
        BudgetError: It has no budget.
    """
    (placement, *more) = method.placements(32)
    if more or placement.stage is not Stage.PRE_LLM or placement.probe is not None:
        raise UnsupportedMethodError(
            f"{method.name} acts in the encoder or the LLM; with --encoder only methods that act "
            "once, before the LLM, can be shown (divprune, fastervlm, visionzip, uniform...)"
        )
    gives = _ALWAYS | (_WITH_CLS if tokens.cls_attention is not None else frozenset())
    gives |= {Signal.VISION_KEYS} if tokens.vision_keys is not None else frozenset()
    # to one that merges the projector is where means go through; others score by it
    gives |= {Signal.PROJECTOR} if method.merges else frozenset()
    if missing := method.signals() - gives:
        names = ", ".join(sorted(signal.value for signal in missing))
        raise UnsupportedMethodError(
            f"{method.name} reads {names}, which an encoder alone cannot give"
        )
    total = tokens.num_visual
    count = placement.budget.resolve(total)
    kept = tuple(range(total))
    if count < total or placement.adaptive:
        with torch.inference_mode():
            (chosen,) = method.plan(tokens, count).keep
        kept = tuple(chosen.tolist())
    assert tokens.grid is not None
    where = PlacementReport(method.name, placement.stage.value, 0, len(kept), kept)
    return ImageReport("image", total, len(kept), kept, (), tokens.grid, (where,))
