"""`train_reference`: both stages, evaluation, curves and model card in one resumable call."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from vispress.reference.card import write_card, write_curves
from vispress.reference.checkpoint import export, for_inference, for_training
from vispress.reference.dense import DenseHeads
from vispress.reference.evaluate import accuracy
from vispress.reference.loop import Budget, Run
from vispress.reference.model import TEXT_WIDTH, VISION_WIDTH, build_model, reference_config
from vispress.reference.parallel import is_main
from vispress.reference.processor import build_processor
from vispress.reference.train_language import train_language
from vispress.reference.train_vision import train_vision


def train_reference(
    out_dir: str | Path,
    *,
    seed: int = 0,
    vision_minutes: float | None = None,
    vision_images: int | None = None,
    language_minutes: float | None = None,
    language_images: int | None = None,
    resume: bool = True,
    device: str | torch.device = "cpu",
    workers: int = 1,
    vision_batch: int = 32,
    language_batch: int = 16,
    questions: int = 1000,
    check_questions: int = 64,
    config: dict[str, int] | None = None,
) -> dict[str, float]:
    """Train the reference model from nothing.

    Without any budget: 45,000 images of vision, then 100,000 of language. Writes into `out_dir`:
    `vision/` and `language/` (log and resumable state), `checkpoint/` (a Hugging Face folder,
    rewritten at every saved state), `accuracy.json`, `curves.png` and the card in `checkpoint/`.

    Args:
        out_dir: Where everything goes; created.
        seed: Seed of weights, scenes and questions. Runs limited by images alone repeat exactly
            on one machine with the same number of threads.
        vision_minutes: Limit of stage 1 in minutes of training.
        vision_images: Limit of stage 1 in images.
        language_minutes: Limit of stage 2 in minutes of training.
        language_images: Limit of stage 2 in images.
        resume: Continue from saved state; `False` starts over and overwrites it.
        device: `"cpu"`, `"cuda"` or `"cuda:1"`.
        workers: Processes that draw scenes; 8 or more keep a GPU busy.
        vision_batch: Images a step in stage 1.
        language_batch: Images a step in stage 2.
        questions: Held-out questions a kind in the final evaluation.
        check_questions: The same at every saved state; 0 for none.
        config: Arguments for `reference_config`.

    Returns:
        Final accuracy by question kind.

    Raises:
        CheckpointError: Saved state is damaged.
        ConfigError: Saved state belongs to other settings.
        ValueError: A budget is not positive.
    """
    out = Path(out_dir)
    place = torch.device(device)
    if vision_minutes is None and vision_images is None:
        vision_images = 45_000
    if language_minutes is None and language_images is None:
        language_images = 100_000
    budgets = Budget(vision_minutes, vision_images), Budget(language_minutes, language_images)
    if not resume:
        for stage in ("vision", "language"):
            for name in ("log.jsonl", "state.safetensors"):
                (out / stage / name).unlink(missing_ok=True)
    model = build_model(reference_config(**(config or {})), seed=seed).to(place)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = DenseHeads(TEXT_WIDTH, VISION_WIDTH).to(place)
    for_training(model)
    common: dict[str, Any] = {"seed": seed, "device": place, "workers": workers, "resume": True}
    train_vision(model, heads, out / "vision", budget=budgets[0], batch=vision_batch, **common)

    def report(run: Run) -> None:
        _report(model, out, run, check_questions)

    train_language(
        model,
        heads,
        out / "language",
        budget=budgets[1],
        batch=language_batch,
        report=report,
        **common,
    )
    return finish(out, model, questions=questions) if is_main() else {}


def _report(model: LlavaForConditionalGeneration, out: Path, run: Run, questions: int) -> None:
    """Export, and append a quick accuracy to the log."""
    export(model, out / "checkpoint")
    if questions:
        for_inference(model)
        scores = accuracy(model, build_processor(), n=questions, seed=1)
        for_training(model)
        mean = sum(scores.values()) / len(scores)
        run.log({"accuracy": {k: round(v, 3) for k, v in scores.items()}, "mean": mean})
        run.skip_time()


def finish(
    out: Path, model: LlavaForConditionalGeneration, *, questions: int
) -> dict[str, float]:
    """Export, evaluate on held-out questions, write curves and card.

    Args:
        out: Folder with the logs of both stages.
        model: The trained model.
        questions: Held-out questions a kind.

    Returns:
        Accuracy by question kind.
    """
    for_inference(model)
    export(model, out / "checkpoint")
    scores = {str(k): v for k, v in accuracy(model, build_processor(), n=questions).items()}
    result = {"questions": questions, "accuracy": scores}
    (out / "accuracy.json").write_text(json.dumps(result, indent=2) + "\n")
    write_curves(out)
    write_card(out, scores, questions=questions)
    return scores
