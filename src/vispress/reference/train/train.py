"""`train_reference`: three stages, evaluation, curves and model card in one resumable call."""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from vispress.checks import check_choice
from vispress.errors import ConfigError
from vispress.reference.evaluation.clip_sets import clip_accuracy
from vispress.reference.evaluation.conversation import episode_accuracy
from vispress.reference.evaluation.evaluate import accuracy
from vispress.reference.model.architecture import ARCHITECTURES, Architecture, QwenReference
from vispress.reference.model.checkpoint import (
    architecture_of,
    export,
    for_inference,
    for_training,
    read,
)
from vispress.reference.train.card import write_card, write_curves
from vispress.reference.train.clips import train_clips
from vispress.reference.train.episodes import extend_vocabulary, train_episodes
from vispress.reference.train.language import train_language
from vispress.reference.train.loop import Budget, Run
from vispress.reference.train.parallel import is_main
from vispress.reference.train.vision import train_vision


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything `train_reference` was asked for; see there."""

    out: Path
    architecture: str
    seed: int
    vision: Budget
    language: Budget
    device: str
    workers: int
    vision_batch: int
    language_batch: int
    questions: int
    check_questions: int
    episodes: Budget
    episodes_batch: int
    start: Path | None
    config: dict[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> Architecture:
        """The architecture by its name."""
        return ARCHITECTURES[self.architecture]


def train_reference(
    out_dir: str | Path,
    *,
    architecture: str = "llava",
    seed: int = 0,
    vision_minutes: float | None = None,
    vision_images: int | None = None,
    language_minutes: float | None = None,
    language_images: int | None = None,
    episodes_minutes: float | None = None,
    episodes_images: int | None = None,
    start: str | Path | None = None,
    resume: bool = True,
    device: str = "cpu",
    workers: int = 1,
    processes: int = 1,
    vision_batch: int = 32,
    language_batch: int = 16,
    episodes_batch: int = 24,
    questions: int = 1000,
    check_questions: int = 32,
    config: dict[str, int] | None = None,
) -> dict[str, float]:
    """Train the reference model from nothing.

    Without any budget: 32,000 images of vision, 32,000 of language, then 48,000 of stage 3: of
    episodes (several pictures, examples, conversations) for LLaVA, of clips for Qwen. Writes into
    `out_dir`: `vision/`, `language/` and `episodes/` or `clips/` (log and resumable state),
    `checkpoint/` (a Hugging Face folder with the model card, rewritten at every saved state),
    `accuracy.json` and `curves.png`.

    Args:
        out_dir: Where everything goes; created.
        architecture: `"llava"` or `"qwen2_5_vl"`.
        seed: Seed of weights, scenes and questions. Runs limited by images alone repeat exactly
            on one machine with the same numbers of threads and processes.
        vision_minutes: Limit of stage 1 in minutes of training.
        vision_images: Limit of stage 1 in images.
        language_minutes: Limit of stage 2 in minutes of training.
        language_images: Limit of stage 2 in images.
        episodes_minutes: Limit of stage 3 in minutes of training.
        episodes_images: Limit of stage 3 in images.
        start: Folder of a checkpoint that stage 3 starts from, stages 1 and 2 being left out;
            words it lacks are added.
        resume: Continue from saved state; `False` starts over and overwrites it.
        device: `"cpu"`, `"cuda"` or `"cuda:1"`.
        workers: Processes that draw scenes, for each training process; 8 keep a GPU busy.
        processes: Data-parallel training processes of one thread each; on a CPU that other work
            shares, as many as there are cores are faster than one process with as many threads.
        vision_batch: Images a step in stage 1.
        language_batch: Images a step in stage 2.
        episodes_batch: Pictures a step in stage 3; clips for Qwen.
        questions: Held-out questions a kind in the final evaluation.
        check_questions: The same at every saved state; 0 for none.
        config: `vision_layers` and `text_layers`, where they differ from the shipped model's.

    Returns:
        Final accuracy by question kind.

    Raises:
        CheckpointError: Saved state is damaged.
        ConfigError: Saved state belongs to other settings, `architecture` is unknown or not that
            of `start`, a budget is not positive, `processes` does not divide every batch, or is
            more than 1 on another device than the CPU.
    """
    check_choice("architecture", architecture, ARCHITECTURES)
    if vision_minutes is None and vision_images is None:
        vision_images = 32_000
    if language_minutes is None and language_images is None:
        language_images = 32_000
    if episodes_minutes is None and episodes_images is None:
        episodes_images = 48_000
    batches = vision_batch, language_batch, episodes_batch
    if processes < 1 or any(batch % processes for batch in batches):
        raise ConfigError(f"processes must divide the batches {batches}: {processes}")
    if processes > 1 and torch.device(device).type != "cpu":
        raise ConfigError(f"several processes train on the CPU only, not on {device}")
    plan = Plan(
        out=Path(out_dir),
        architecture=architecture,
        seed=seed,
        vision=Budget(vision_minutes, vision_images),
        language=Budget(language_minutes, language_images),
        device=device,
        workers=workers,
        vision_batch=vision_batch,
        language_batch=language_batch,
        questions=questions,
        check_questions=check_questions,
        episodes=Budget(episodes_minutes, episodes_images),
        episodes_batch=episodes_batch,
        start=None if start is None else Path(start),
        config=config or {},
    )
    if not resume:
        _forget(plan.out)
    if processes == 1:
        _train(plan)
    else:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (processes, f"file://{folder}/meet", plan)
            spawn(_process, arguments, nprocs=processes)  # type: ignore[no-untyped-call]
    result = json.loads((plan.out / "accuracy.json").read_text())
    return dict(result["accuracy"])


def _forget(out: Path) -> None:
    for stage in ("vision", "language", "episodes", "clips"):
        for name in ("log.jsonl", "state.safetensors"):
            (out / stage / name).unlink(missing_ok=True)


def _process(rank: int, world: int, meet: str, plan: Plan) -> None:
    """Run one of several training processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    try:
        _train(plan)
        # the others wait while the main process evaluates
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _train(plan: Plan) -> None:
    """Run all stages and the evaluation, in this process."""
    torch.set_flush_denormal(True)
    device = torch.device(plan.device)
    common: dict[str, Any] = {"seed": plan.seed, "device": device, "workers": plan.workers}
    if plan.start is None:
        model = plan.kind.build(plan.config, plan.seed).to(device)
        for_training(model)
        _train_from_nothing(model, plan, common)
    else:
        model = read(plan.start)[0].to(device).train()
        if (kind := architecture_of(model)) is not plan.kind:
            raise ConfigError(f"{plan.start} holds a {kind.name!r}, not a {plan.architecture!r}")
        if plan.kind.third == "episodes":
            extend_vocabulary(model)
        for_training(model)

    def report(run: Run) -> None:
        _report(model, plan, run, third=True)

    third = {"budget": plan.episodes, "batch": plan.episodes_batch, "report": report, **common}
    if isinstance(plan.kind, QwenReference):
        train_clips(plan.kind, model, plan.out / plan.kind.third, **third)
    else:
        train_episodes(model, plan.out / plan.kind.third, **third)
    if is_main():
        finish(plan.out, model, questions=plan.questions)


def _train_from_nothing(model: Any, plan: Plan, common: dict[str, Any]) -> None:
    """Run stages 1 and 2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        heads = plan.kind.heads().to(common["device"])
    folders = plan.out / "vision", plan.out / "language"
    train_vision(
        plan.kind, model, heads, folders[0], budget=plan.vision, batch=plan.vision_batch, **common
    )

    def report(run: Run) -> None:
        _report(model, plan, run, third=False)

    train_language(
        plan.kind,
        model,
        heads,
        folders[1],
        budget=plan.language,
        batch=plan.language_batch,
        report=report,
        **common,
    )


def _report(model: Any, plan: Plan, run: Run, *, third: bool) -> None:
    """Export, and append a quick accuracy to the log."""
    export(model, plan.out / "checkpoint")
    if not plan.check_questions:
        return
    for_inference(model)
    processor = plan.kind.processor()
    scores = accuracy(model, processor, n=plan.check_questions, seed=1)
    if third:
        scores |= _third_accuracy(model, processor, n=plan.check_questions, seed=1)
    for_training(model)
    mean = sum(scores.values()) / len(scores)
    run.log({"accuracy": {k: round(v, 3) for k, v in scores.items()}, "mean": mean})
    run.skip_time()
    unfinished = "Intermediate checkpoint of a run that is not finished"
    write_card(plan.out, scores, questions=plan.check_questions, note=unfinished)


def _third_accuracy(model: Any, processor: Any, *, n: int, seed: int = 0) -> dict[str, float]:
    """Measure accuracy on the kinds of stage 3."""
    ask = clip_accuracy if architecture_of(model).third == "clips" else episode_accuracy
    return ask(model, processor, n=n, seed=seed)


def finish(out: Path, model: Any, *, questions: int) -> dict[str, float]:
    """Export, evaluate on held-out questions, write curves and card.

    Args:
        out: Folder with the logs of all stages.
        model: The trained model.
        questions: Held-out questions a kind.

    Returns:
        Accuracy by question kind, also written to `accuracy.json`.
    """
    for_inference(model)
    export(model, out / "checkpoint")
    kind = architecture_of(model)
    scores = accuracy(model, kind.processor(), n=questions)
    scores |= _third_accuracy(model, kind.processor(), n=questions)
    result = {"questions": questions, "accuracy": scores}
    (out / "accuracy.json").write_text(json.dumps(result, indent=2) + "\n")
    write_curves(out)
    write_card(out, scores, questions=questions)
    return scores
