"""Save the compression of a model, with what was trained of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from vispress.api import attachment_of
from vispress.weights import write_saved


def save_compression(
    model: nn.Module, folder: str | Path, *, data: Mapping[str, Any] | None = None
) -> None:
    """Write what a model is compressed by, and the parameters of its methods, into a folder.

    `compress_model(model, config=folder)` has it again: `compressor.yaml`, `modules.safetensors`
    (where a method has parameters) and a card, `vispress.json`, with the model's name, versions
    and a hash. `save_pretrained` leaves the parameters out, so that the model's own folder loads as
    ever. Of a model that FSDP shards, every process calls it, and the first one writes.

    Args:
        model: A compressed model, possibly wrapped.
        folder: Made if need be; what was saved there before is replaced.
        data: For the card: what the parameters were trained on, and how.

    Raises:
        CompressionStateError: The model is not compressed.
        ConfigError: The folder holds pickles, or `data` cannot be written as JSON.
    """
    from vispress import __version__
    from vispress.runtime.modules import held
    from vispress.versions import SUPPORTED, check_version

    attachment = attachment_of(model)
    request, adapter = attachment.request, attachment.plan.adapter
    module = held(adapter.base)
    tensors = {} if module is None else {k: _whole(v) for k, v in module.state_dict().items()}
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    config = adapter.base.config
    card = {
        "base_model": _name_of(config),
        "model_type": getattr(config, "model_type", ""),
        "family": adapter.family,
        "positions": request.positions,
        "versions": {"vispress": __version__, **{name: check_version(name) for name in SUPPORTED}},
        "data": dict(data or {}),
    }
    write_saved(Path(folder), request.methods, request.mean, tensors, card)


def _whole(tensor: Tensor) -> Tensor:
    """A tensor of which every process may have a part."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def _name_of(config: Any) -> str:
    """What the model was loaded as; of a folder its last part, as a card may be passed on."""
    name = str(getattr(config, "_name_or_path", ""))
    return Path(name).name if Path(name).is_absolute() else name
