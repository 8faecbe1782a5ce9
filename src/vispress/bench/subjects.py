"""The model under test, with its processor and the hash of its weights."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vispress.bench.tasks import Prompt
from vispress.errors import ConfigError


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

    def encode(self, prompts: Sequence[Prompt]) -> Any:
        """Left-padded inputs of a batch, on the model's device."""
        from vispress.reference.processor import with_marks

        return self.processor(
            images=[image for prompt in prompts for image in prompt.images],
            text=[with_marks(self.processor, prompt.text) for prompt in prompts],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """Greedy answers of one batch, through `model.generate`."""
        inputs = self.encode(prompts)
        out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        words = self.processor.batch_decode(new, skip_special_tokens=True)
        return [answer.strip() for answer in words]


def load_subject(name: str = "reference", device: str | torch.device = "cpu") -> Subject:
    """Load `"reference"`, `"reference-qwen"`, or a folder that `vispress train-reference` wrote.

    Raises:
        CheckpointError: A checkpoint is missing or damaged.
        ConfigError: The folder or the device does not exist.
    """
    from vispress.reference.checkpoint import SHIPPED, SHIPPED_QWEN, read

    shipped = {"reference": SHIPPED, "reference-qwen": SHIPPED_QWEN}
    folder = shipped.get(name, Path(name))
    if name not in shipped and not folder.is_dir():
        raise ConfigError(
            "model must be 'reference', 'reference-qwen' or a folder with a checkpoint, "
            f"got {name!r}"
        )
    model, processor = read(folder)
    try:
        model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"cannot use the device {device!r}: {error}") from error
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
    return Subject(name, model.eval(), processor, digest)
