"""The model under test, with its processor and the hash of its weights."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch

from vispress.bench.model.multi_turn import converse
from vispress.bench.model.names import REFERENCES
from vispress.bench.tasks.task import Prompt
from vispress.errors import ConfigError

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: Final[dict[Dtype, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model under test, with its processor.

    Args:
        name: As in the plan.
        model: In eval mode.
        processor: Its processor.
        weights: Hash of the stored weights.
    """

    name: str
    model: Any
    processor: Any
    weights: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def encode(
        self,
        prompts: Sequence[Prompt],
        *,
        images: Sequence[Sequence[Any]] | None = None,
        videos: Sequence[Sequence[Any]] | None = None,
        **options: Any,
    ) -> Any:
        """Process a batch's first turn into left-padded inputs on the model's device.

        Args:
            prompts: The batch.
            images: Other pictures in place of each prompt's own.
            videos: Other videos likewise.
            **options: For the processor.

        Raises:
            ConfigError: There are videos, and the model takes none here.
        """
        from vispress.reference.model.processor import with_marks

        pictures = [prompt.images for prompt in prompts] if images is None else images
        flat = [image for x in pictures for image in x]
        clips = [prompt.videos for prompt in prompts] if videos is None else videos
        if shown := [clip for x in clips for clip in x]:
            self.check_videos()
            options = {"videos": shown} | options
        return self.processor(
            images=flat or None,
            text=[with_marks(self.processor, prompt.text) for prompt in prompts],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **options,
        ).to(self.model.device, self.model.dtype)

    def check_videos(self) -> None:
        """Check that prompts may show videos.

        Raises:
            ConfigError: They may not.
        """
        from vispress.reference.model.processor import PicturesProcessor

        if not isinstance(self.processor, PicturesProcessor):
            raise ConfigError(
                f"{self.name!r} is asked about pictures alone; tasks that show videos need "
                "'reference-qwen-clips', or a folder of that architecture that `vispress "
                "train-reference` wrote"
            )

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """Answer one batch greedily, through `model.generate`; turns are joined by " / "."""
        return [
            " / ".join(turns)
            for turns in self.converse(prompts, self.encode(prompts), max_new_tokens)
        ]

    def converse(
        self, prompts: Sequence[Prompt], inputs: Any, max_new_tokens: int
    ) -> list[tuple[str, ...]]:
        """Answer every turn of one batch greedily, the cache kept between turns.

        Args:
            prompts: The batch.
            inputs: As `encode` gives them.
            max_new_tokens: Of each answer.
        """
        followups = [[text for text, _ in prompt.followups] for prompt in prompts]
        return converse(self.model, self.processor.tokenizer, inputs, followups, max_new_tokens)


def load_named_model(
    name: str = "reference", device: str | torch.device = "cpu", dtype: Dtype = "fp32"
) -> LoadedModel:
    """Load a reference model, or any other checkpoint through `load_checkpoint`.

    Args:
        name: One of `REFERENCES`, a folder that `vispress train-reference` wrote, another Hugging
            Face folder, or a hub id (`org/name`, `org/name@revision`).
        device: Where it goes.
        dtype: Of weights and computation.

    Raises:
        CheckpointError: A checkpoint is missing or damaged, or cannot be reached.
        ConfigError: The folder or the device does not exist.
        UnsupportedModelError: No adapter knows the checkpoint's architecture.
    """
    from vispress.reference.folders import shipped_folder, weights_of
    from vispress.reference.model.checkpoint import read

    folder = shipped_folder(name) if name in REFERENCES else Path(name)
    if name not in REFERENCES and not _is_reference(folder):
        from vispress.bench.model.checkpoints import load_checkpoint

        return load_checkpoint(name, device=device, dtype=DTYPES[dtype])
    model, processor = read(folder, dtype=DTYPES[dtype])
    to_device(model, device)
    stored = b"".join(file.read_bytes() for file in weights_of(folder))
    digest = hashlib.sha256(stored).hexdigest()[:16]
    return LoadedModel(name, model.eval(), processor, digest)


def to_device(model: Any, device: str | torch.device) -> None:
    """Move a model, or say that there is no such device."""
    try:
        model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"cannot use the device {device!r}: {error}") from error


def _is_reference(folder: Path) -> bool:
    """Tell whether a folder holds a reference model: whole words for tokens, no chat template."""
    if (folder / "chat_template.jinja").is_file():
        return False
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        return bool(json.loads(text)["model"]["type"] == "WordLevel")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
