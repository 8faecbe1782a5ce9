"""The model under test, with its processor and the hash of its weights."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch

from vispress.bench.tasks import Prompt
from vispress.bench.turns import converse
from vispress.errors import ConfigError

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: Final[dict[Dtype, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Subject:
    """What is measured.

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
        **options: Any,
    ) -> Any:
        """Left-padded inputs of a batch's first turn, on the model's device.

        Args:
            prompts: The batch.
            images: Other pictures in place of each prompt's own.
            **options: For the processor.
        """
        pictures = [prompt.images for prompt in prompts] if images is None else images
        flat = [image for own in pictures for image in own]
        return self.processor(
            images=flat or None,
            text=[prompt.text for prompt in prompts],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **options,
        ).to(self.model.device, self.model.dtype)

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """Greedy answers of one batch, through `model.generate`; those of turns joined by " / "."""
        return [
            " / ".join(turns)
            for turns in self.converse(prompts, self.encode(prompts), max_new_tokens)
        ]

    def converse(
        self, prompts: Sequence[Prompt], inputs: Any, max_new_tokens: int
    ) -> list[tuple[str, ...]]:
        """Greedy answers of every turn of one batch, the cache kept between turns.

        Args:
            prompts: The batch.
            inputs: As `encode` gives them.
            max_new_tokens: Of each answer.
        """
        followups = [[text for text, _ in prompt.followups] for prompt in prompts]
        return converse(self.model, self.processor.tokenizer, inputs, followups, max_new_tokens)


def load_subject(
    name: str = "reference", device: str | torch.device = "cpu", dtype: Dtype = "fp32"
) -> Subject:
    """Load `"reference"`, or a folder that `vispress train-reference` wrote.

    Raises:
        CheckpointError: A checkpoint is missing or damaged.
        ConfigError: The folder or the device does not exist.
    """
    from vispress.reference.checkpoint import SHIPPED, read

    folder = SHIPPED if name == "reference" else Path(name)
    if name != "reference" and not folder.is_dir():
        raise ConfigError(f"model must be 'reference' or a folder with a checkpoint, got {name!r}")
    model, processor = read(folder, dtype=DTYPES[dtype])
    try:
        model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"cannot use the device {device!r}: {error}") from error
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
    return Subject(name, model.eval(), processor, digest)
