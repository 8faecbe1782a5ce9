"""Writing and reading the reference model as an ordinary Hugging Face folder."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from vispress.errors import CheckpointError
from vispress.model_folders import load_model, read_settings
from vispress.reference.folders import SHIPPED, weights_of
from vispress.reference.model.architecture import ARCHITECTURES, Architecture
from vispress.reference.model.llava_next import read_delta

FILES: Final = ("config.json", "processor_config.json", "tokenizer.json")


def architecture_of(model: Any) -> Architecture:
    """Find the reference architecture of a model.

    Raises:
        KeyError: It has none of them.
    """
    return ARCHITECTURES[model.config.model_type]


def for_training(model: Any) -> None:
    """Switch to the attention functions of packed training."""
    architecture_of(model).for_training(model)


def for_inference(model: Any) -> None:
    """Switch back to SDPA, as the loaded model has it."""
    model.set_attn_implementation("sdpa")


def export(model: Any, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write weights, configuration, tokenizer and processor, replacing the folder at the end.

    Args:
        model: The model; not changed.
        folder: What `read` takes.
        dtype: Storage type; fp16 keeps three more bits of these small weights than bf16.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    stored = copy.deepcopy(model)
    for_inference(stored)
    stored.to(dtype).eval().save_pretrained(temporary)
    architecture_of(model).processor().save_pretrained(temporary)
    for file in temporary.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)  # noqa: PTH105 - a rename, so that no half folder is ever seen


def read(folder: Path, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a folder that `export` or `export_delta` wrote, offline.

    Args:
        folder: The folder.
        dtype: Type of the loaded weights.

    Returns:
        The model in eval mode on the CPU, and its processor.

    Raises:
        CheckpointError: A file is missing or damaged, or weights do not fit the configuration.
    """
    needed = (*FILES, *(file.name for file in weights_of(folder) if file.parent == folder))
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise _error(folder, f"{', '.join(missing)} missing")
    try:
        if _model_type(folder) == "llava_next":
            return read_delta(folder, read(SHIPPED)[0], dtype)
        kind = _architecture(folder)
        model, info = load_model(
            getattr(transformers, kind.model_class),
            folder,
            "its weights",
            dtype=dtype,
            attn_implementation="sdpa",
        )
        processor = kind.load_processor(folder)
    except (CheckpointError, ValueError, KeyError, TypeError) as error:
        raise _error(folder, f"{type(error).__name__}: {error}") from error
    # transformers only warns and fills the gaps with random weights
    wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if wrong:
        raise _error(folder, json.dumps(wrong))
    return model.eval(), processor


def _model_type(folder: Path) -> str:
    return str(read_settings(folder / "config.json", "the model")["model_type"])


def _architecture(folder: Path) -> Architecture:
    """Find the architecture that a folder's configuration names."""
    name = _model_type(folder)
    if name not in ARCHITECTURES:
        raise ValueError(f"model_type {name!r} is none of {[*ARCHITECTURES]}")
    return ARCHITECTURES[name]


def _error(folder: Path, what: str) -> Exception:
    return CheckpointError(
        f"the reference checkpoint in {folder} is damaged ({what}). Reinstall the package, or "
        "write a new one with `vispress train-reference`"
    )
