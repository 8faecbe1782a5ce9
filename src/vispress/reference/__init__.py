"""The reference VLMs: a small, real LLaVA and a Qwen2.5-VL trained from nothing, shipped.

`load()` gives model and processor offline; `heldout()` gives questions they were never trained on;
`compressor()` is the folder of a trained compressor of each.

Packages, each of which knows only those below it:

* `train`: three resumable stages of training, and the model card
* `evaluation`: held-out questions, and exact match of what a model answers
* `model`: two architectures, their processors and checkpoints
* `world`: drawn scenes and clips, and questions about them
* `folders`: where what is shipped lies

The demo's checkpoint and compressor lie beside these, the others in `vispress-references`.
`vispress.reference.processor` is the public path of `model.processor`.
"""

from typing import TYPE_CHECKING, Any

from vispress.reference.world.words import KINDS

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from PIL.Image import Image

    from vispress.reference.train.train import train_reference
    from vispress.reference.world.questions import Question
    from vispress.reference.world.words import QuestionKind

__all__ = ["KINDS", "compressor", "heldout", "load", "train_reference"]


def load(
    dtype: "torch.dtype | None" = None, *, architecture: str = "llava", clips: bool = False
) -> tuple[Any, Any]:
    """Load a shipped reference model; nothing is downloaded.

    Args:
        dtype: Type of the weights; fp32 by default (they are stored in fp16).
        architecture: `"llava"` (`LlavaForConditionalGeneration`) or `"qwen2_5_vl"`
            (`Qwen2_5_VLForConditionalGeneration`; its processor takes videos without torchvision).
        clips: Of the Qwen2.5-VL, the one that was trained on short videos, too.

    Returns:
        The model in eval mode on the CPU with SDPA attention, and its processor. Prompts of
        `heldout` go through `with_marks` of `vispress.reference.processor` on their way to it: a
        Qwen model has its pictures between two marks.

    Raises:
        CheckpointError: A file of the checkpoint is missing or damaged, or it is in the
            distribution `vispress-references`, which is not installed.
        ConfigError: `architecture` is unknown, or has no model that was trained on videos; or
            pillow is missing, which its processor needs.
    """
    from vispress.extras import PICTURES, check_packages

    check_packages(PICTURES, "the reference model's processor")
    import torch

    from vispress.checks import check_choice
    from vispress.reference.folders import SHIPPED_BY_NAME, SHIPPED_CLIPS, installed

    check_choice("architecture", architecture, SHIPPED_BY_NAME)
    if clips:
        check_choice("architecture with clips=True", architecture, ("qwen2_5_vl",))
    from vispress.reference.model.checkpoint import read

    folder = installed(SHIPPED_CLIPS if clips else SHIPPED_BY_NAME[architecture])
    return read(folder, dtype=dtype or torch.float32)


def compressor(*, architecture: str = "llava") -> "Path":
    """Find the shipped compressor of a reference model: relevance DPP with learned parameters.

    `compress_model(model, config=compressor())` compresses the model that `load()` gives. Made by
    `vispress train-compressor` on training-split scenes; its card says how.

    Args:
        architecture: As in `load`.

    Returns:
        A folder as `save_compression` writes it.

    Raises:
        CheckpointError: It is in the distribution `vispress-references`, which is not installed.
        ConfigError: `architecture` is unknown.
    """
    from vispress.checks import check_choice
    from vispress.reference.folders import COMPRESSORS, installed

    check_choice("architecture", architecture, COMPRESSORS)
    return installed(COMPRESSORS[architecture])


def heldout(
    kind: "QuestionKind", n: int, seed: int = 0
) -> "list[tuple[Image, str, str, Question]]":
    """Draw held-out questions of one kind: unseen scenes and handwriting, balanced answers.

    Args:
        kind: One of `KINDS`.
        n: How many; each has a scene of its own.
        seed: Other seeds give other scenes; no seed gives a scene that was trained on.

    Returns:
        Picture, prompt for the processor (it starts with `<image>`), answer, and the question
        with the visual tokens that hold its evidence. Equal arguments give equal questions.

    Raises:
        ConfigError: `kind` is unknown or `n` is not positive; or a package is missing that draws
            scenes.
    """
    from vispress.extras import SCENES, check_packages

    check_packages(SCENES, "drawing scenes")
    from vispress.reference.evaluation.evaluate import held_out

    return [
        (e.image, e.question.prompt, e.question.answer, e.question)
        for e in held_out(kind, n, seed=seed)
    ]


def __getattr__(name: str) -> object:
    if name == "train_reference":
        from vispress.reference.train.train import train_reference

        return train_reference
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
