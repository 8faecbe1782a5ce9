"""Any Hugging Face image-text-to-text checkpoint as the model under test.

Prompts go through the checkpoint's own chat template, if it has one. Only safetensors are read, and
no code that comes with a checkpoint is run.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from vispress.adapters.base import find_adapter, list_families
from vispress.bench.model.loaded_model import LoadedModel, to_device
from vispress.bench.model.names import HUB_ID, REFERENCES, check_model_name
from vispress.bench.tasks.task import MARK, Prompt
from vispress.errors import CheckpointError, UnsupportedModelError
from vispress.model_folders import (
    check_folder,
    first_line,
    load_model,
    load_part,
    read_settings,
    skeleton,
)
from vispress.reference.folders import shipped_folder

_ANSWER: Final = "\u241eanswer\u241e"  # stands for the model's answer when a template is rendered
_FILES: Final = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.txt")
_OTHER_COPIES: Final = ("consolidated*", "original/*", "onnx/*")
_BLOCK, _BLOCKS = 2**16, 64


@dataclass(frozen=True)
class Checkpoint(LoadedModel):
    """A checkpoint with its processor; texts are rendered by its chat template."""

    def encode(
        self,
        prompts: Sequence[Prompt],
        *,
        images: Sequence[Sequence[Any]] | None = None,
        videos: Sequence[Sequence[Any]] | None = None,
        **options: Any,
    ) -> Any:
        """Process a batch's first turn through the chat template; see `LoadedModel.encode`."""
        if videos or any(prompt.videos for prompt in prompts):
            self.check_videos()
        texts = [self._render([prompt.text]) for prompt in prompts]
        bos = self.processor.tokenizer.bos_token
        if bos and all(text.startswith(bos) for text in texts):
            # the template has written it already
            options = {"add_special_tokens": False} | options
        shown = [list(prompt.images) for prompt in prompts] if images is None else images
        return self.processor(
            images=[list(pictures) for pictures in shown] if any(shown) else None,
            text=texts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **options,
        ).to(self.model.device, self.model.dtype)

    def converse(
        self, prompts: Sequence[Prompt], inputs: Any, max_new_tokens: int
    ) -> list[tuple[str, ...]]:
        """Answer every turn, the template's words between them; see `LoadedModel.converse`."""
        rendered = [
            replace(
                prompt,
                followups=tuple(
                    (self._render([prompt.text, text]).rpartition(_ANSWER)[2], answer)
                    for text, answer in prompt.followups
                ),
            )
            if prompt.followups and self.processor.chat_template
            else prompt
            for prompt in prompts
        ]
        return super().converse(rendered, inputs, max_new_tokens)

    def _render(self, turns: Sequence[str]) -> str:
        """Render the questions of a conversation, each but the last answered."""
        if not self.processor.chat_template:
            return " ".join(turns).replace(MARK, self.processor.image_token)
        messages: list[dict[str, Any]] = []
        for turn in turns:
            if messages:
                words = {"type": "text", "text": _ANSWER}
                messages.append({"role": "assistant", "content": [words]})
            messages.append({"role": "user", "content": content_of(turn)})
        try:
            text = self.processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # jinja's own (the sandbox's too), or whatever a template raises
            raise CheckpointError(
                f"the chat template of {self.name} fails: {first_line(error)}"
            ) from error
        return str(text)


def content_of(text: str) -> list[dict[str, str]]:
    """Turn a text with `<image>` marks into the content of a chat message."""
    content: list[dict[str, str]] = []
    for number, part in enumerate(text.split(MARK)):
        content += [{"type": "image"}] if number else []
        # templates put their own space around pictures
        content += [{"type": "text", "text": part.strip()}] if part.strip() else []
    return content


def load_checkpoint(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
) -> Checkpoint:
    """Load a local folder, or a hub id, which is downloaded unless it is cached.

    Args:
        name: A folder, `org/name` or `org/name@revision`. With `HF_HUB_OFFLINE` set, only the cache
            is looked into.
        device: Where the model goes; `"auto"` spreads it over the devices there are.
        dtype: Of weights and computation.
        attention: `attn_implementation` of transformers; None for its choice.

    Raises:
        CheckpointError: It cannot be reached, or a file is missing or damaged.
        ConfigError: The name, the device or the attention does not exist, or a package is missing.
        UnsupportedModelError: No adapter knows the architecture; found before weights are read.
    """
    folder = Path(name)
    if not folder.is_dir():
        check_model_name(name)
        hub_id = HUB_ID.fullmatch(name)
        assert hub_id is not None
        # the configuration first: an unsupported model need not be downloaded
        _check_architecture(_fetch(hub_id[1], hub_id[2], ("config.json",)), name)
        folder = _fetch(hub_id[1], hub_id[2], _FILES)
    _check_architecture(folder, name)
    model = _read_model(folder, name, str(device) == "auto", dtype, attention)
    processor = _read_processor(folder, name)
    if str(device) != "auto":
        to_device(model, device)
    _complete(model, processor)
    return Checkpoint(name, model.eval(), processor, weights_hash(folder))


def weights_hash(folder: Path) -> str:
    """Hash a checkpoint: small files whole; of weights the size and 64 blocks of 64 KiB.

    Cheap for large checkpoints, and different for two trainings of one model.
    """
    digest = hashlib.sha256()
    for pattern in sorted(_FILES):
        for file in sorted(folder.glob(pattern)):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as data:
                if size <= _BLOCK * _BLOCKS:
                    digest.update(data.read())
                    continue
                for number in range(_BLOCKS):
                    data.seek(number * (size - _BLOCK) // (_BLOCKS - 1))
                    digest.update(data.read(_BLOCK))
    return digest.hexdigest()[:16]


def _fetch(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(_OTHER_COPIES),
            )
        )
    except Exception as error:  # of the hub, of its HTTP client, of the disk
        raise CheckpointError(
            f"cannot fetch {repo}{f' at {revision}' if revision else ''} from the hub: "
            f"{first_line(error)}. "
            "It must be in the local cache, or the hub must be reachable (HF_HUB_OFFLINE unset) "
            "and the id right; a folder with a copy works too"
        ) from error


def open_skeleton(name: str) -> Any:
    """Build a model without weights (on the meta device), from its configuration alone.

    Args:
        name: As `load_named_model` takes it.

    Raises:
        CheckpointError: It cannot be reached, or its configuration is missing or damaged.
        ConfigError: Nothing has that name.
        UnsupportedModelError: No adapter knows the architecture.
    """
    check_model_name(name)
    if name in REFERENCES:
        return _check_architecture(shipped_folder(name), name)
    folder = Path(name)
    if not folder.is_dir():
        hub_id = HUB_ID.fullmatch(name)
        assert hub_id is not None
        folder = _fetch(hub_id[1], hub_id[2], ("config.json",))
    return _check_architecture(folder, name)


def _check_architecture(folder: Path, name: str) -> Any:
    """Refuse a model that no adapter knows, from its configuration alone; else its skeleton."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{name} has no config.json: it is no Hugging Face checkpoint")
    check_folder(folder, name)
    kind = read_settings(folder / "config.json", name)["model_type"]
    try:
        bare = skeleton(load_part(AutoConfig, folder, name, local_files_only=True))
    except CheckpointError as error:
        families = ", ".join(list_families())
        raise UnsupportedModelError(
            f"{name} is of type {kind!r}, which transformers does not build as an image-text-to-"
            f"text model ({error}); supported families: {families}"
        ) from error
    find_adapter(bare)
    return bare


def _read_model(
    folder: Path, name: str, spread: bool, dtype: torch.dtype, attention: str | None
) -> Any:
    from transformers import AutoModelForImageTextToText

    options: dict[str, Any] = {"device_map": "auto"} if spread else {}
    if attention is not None:
        options["attn_implementation"] = attention
    model, info = load_model(
        AutoModelForImageTextToText, folder, f"the weights of {name}", dtype=dtype, **options
    )
    # transformers only warns, and fills the gaps with random weights
    wrong = {key: sorted(map(str, info[key])) for key in ("missing_keys", "mismatched_keys")}
    if any(wrong.values()):
        shown = {key: keys[:5] for key, keys in wrong.items() if keys}
        raise CheckpointError(f"the weights of {name} do not fit its configuration: {shown}")
    return model


def _read_processor(folder: Path, name: str) -> Any:
    from transformers import AutoProcessor

    processor = load_part(AutoProcessor, folder, f"the processor of {name}", local_files_only=True)
    if not hasattr(processor, "tokenizer"):
        raise CheckpointError(f"{name} has no processor for text and pictures, only a tokenizer")
    return processor


def _complete(model: Any, processor: Any) -> None:
    """Set token ids that generation and padding need, where a checkpoint leaves them out."""
    tokenizer, generation = processor.tokenizer, model.generation_config
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
