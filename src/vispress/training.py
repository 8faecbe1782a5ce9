"""What a training loop asks of a compressed model: losses, parameter groups, progress."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from vispress.api import attachment_of, change_request
from vispress.checks import check_number
from vispress.errors import ConfigError
from vispress.saving import save_compression
from vispress.weights import read_saved

if TYPE_CHECKING:
    from vispress.runtime.forward.losses import Collected

IGNORED = -100
"""Label of what is no answer."""
FOLDER = "compressor"
"""Of a trainer's checkpoint, where the compressor is saved."""


@final
class ExtraLoss:
    """What methods add to the loss of forwards in a block; see `compression_loss`."""

    def __init__(self, collected: "Collected", module: nn.Module | None) -> None:
        self._collected, self._module = collected, module

    def __call__(self) -> Tensor:
        """Sum what was added so far: a scalar, 0 where nothing was."""
        total = self._collected.total()
        own = [p for p in self._parameters() if not hasattr(p, "full_tensor")]
        if total is None:
            device = next(self._collected.base.parameters()).device
            total = torch.zeros((), device=own[0].device if own else device)
        for parameter in own:  # a batch without images gives gradients of 0, as DDP wants
            total = total + 0.0 * parameter.sum().to(total)
        return total

    @property
    def by_name(self) -> Mapping[str, float]:
        """The same apart, for logs (waits for the device)."""
        return {name: float(value) for name, value in self.tensors.items()}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The same apart, as scalars on the device, without gradients."""
        return {name: value.detach() for name, value in self._collected.by_name.items()}

    def _parameters(self) -> Iterator[nn.Parameter]:
        module = self._module
        return iter(()) if module is None else (p for p in module.parameters() if p.requires_grad)


@contextmanager
def compression_loss(model: nn.Module) -> Iterator[ExtraLoss]:
    """Collect what a model's methods add to the loss of the forwards in a block.

        with compression_loss(model) as extra:
            loss = model(**batch).loss + extra()

    Each method's loss is a mean over the images of a call and a sum over its placements
    (`TokenPlan.losses`). Outside of such a block none is kept.

    Args:
        model: A compressed model, possibly wrapped.

    Yields:
        What gives the sum as a scalar, and in `by_name` its parts. It holds every trainable
        parameter of the methods with a factor of 0, so that a batch without images has gradients,
        too (not under FSDP, which has them anyway).

    Raises:
        CompressionStateError: The model is not compressed.
    """
    from vispress.runtime.forward.losses import collecting
    from vispress.runtime.modules import held

    base = attachment_of(model).plan.adapter.base
    with collecting(base) as collected:
        yield ExtraLoss(collected, held(base))


def answer_divergence(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    teacher_labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Measure how far answers of a compressed model are from the uncompressed one's.

    The mean over answer tokens of the Kullback-Leibler divergence of the teacher's distribution and
    the compressed model's, in nats; with a temperature T, of both at T, times T^2. Add it to the
    loss of a loop: what VoCo-LLaMA is derived from, though its authors train on answers alone.

    Args:
        logits: `[B, L, V]` of the compressed model.
        labels: `[B, L]`, -100 on all but answers; not shifted.
        teacher_logits: `[B, M, W]` of the teacher, which saw the same answers; it gets no gradient.
            Words that one of the two lacks (a VoCo token) are left out of both.
        teacher_labels: `[B, M]`, where the teacher's prompts are others; None for `labels`.
        temperature: T, above 0.

    Raises:
        ConfigError: The two have other answers, there is none, or the temperature is out of range.
    """
    check_number("temperature", temperature, low=1e-3, high=1e3)
    seen = labels if teacher_labels is None else teacher_labels
    here, there = labels[:, 1:] != IGNORED, seen[:, 1:] != IGNORED
    if not torch.equal(labels[:, 1:][here], seen.to(labels)[:, 1:][there.to(labels.device)]):
        raise ConfigError(
            f"a teacher must see the same answers, got {int(here.sum())} answer tokens and "
            f"{int(there.sum())} of the teacher, or others; give its labels as teacher_labels"
        )
    if not bool(here.any()):
        raise ConfigError("no label is an answer's: all are -100 behind the first row")
    words = min(logits.shape[-1], teacher_logits.shape[-1])
    own = logits[:, :-1, :words][here].float() / temperature
    theirs = teacher_logits[:, :-1, :words][there].detach().to(own) / temperature
    found = nn.functional.kl_div(
        own.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True
    )
    return found * temperature**2


def parameter_groups(model: nn.Module, *, lr: float, modules_lr: float) -> list[dict[str, Any]]:
    """Sort trainable parameters for an optimiser: the model's, and those of its methods.

    Methods begin untrained on a model that is trained, and want a larger step in short runs (p-MoD:
    20 times).

    Args:
        model: A compressed model, possibly wrapped.
        lr: Of the model's own parameters.
        modules_lr: Of the methods'.

    Returns:
        Groups with `params` and `lr`; one that would be empty is left out.

    Raises:
        CompressionStateError: The model is not compressed.
        ConfigError: A rate is no number above 0.
    """
    from vispress.runtime.modules import held

    for name, rate in (("lr", lr), ("modules_lr", modules_lr)):
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not rate > 0:
            raise ConfigError(f"{name} must be a number above 0, got {rate!r}")
    module = held(attachment_of(model).plan.adapter.base)
    own = {id(p) for p in (() if module is None else module.parameters())}
    trainable = [p for p in model.parameters() if p.requires_grad]
    rest, methods = ([p for p in trainable if (id(p) in own) == inside] for inside in (False, True))
    groups = ({"params": rest, "lr": lr}, {"params": methods, "lr": modules_lr})
    return [group for group in groups if group["params"]]


def set_progress(model: nn.Module, progress: float) -> None:
    """Tell methods how far training is: those with a schedule (`Compressor.at`) follow it.

    Parameters stay; nothing happens where no method's settings change. What is saved, and what
    `update_compression` changes, are the settings that the model was compressed with.

    Args:
        model: A compressed model, possibly wrapped.
        progress: In `[0, 1]`, steps done of all.

    Raises:
        ConfigError: It is out of range.
        CompressionStateError: The model is not compressed, or a forward of it is under way.
    """
    if (
        isinstance(progress, bool)
        or not isinstance(progress, int | float)
        or not 0 <= progress <= 1
    ):
        raise ConfigError(f"progress must be a number in [0, 1], got {progress!r}")
    request = attachment_of(model).request
    if request.at(progress) != request.at(request.progress):
        change_request(model, request.moved(progress))


@final
class CompressionCallback(TrainerCallback):  # type: ignore[misc]
    """Keeps a compressor in step with transformers' `Trainer` (and TRL's, which are made of it).

    It sets progress ahead of each step, saves the compressor in every checkpoint's folder
    `compressor`, and restores it where training is resumed or the best checkpoint is loaded: the
    trainer's own files hold the model without it.

    Args:
        resume_from: The checkpoint that is resumed from, where that is not one of `output_dir`.
    """

    def __init__(self, resume_from: str | Path | None = None) -> None:
        self._resume_from = resume_from

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Set progress."""
        if state.max_steps > 0:
            set_progress(given["model"], min(1.0, state.global_step / state.max_steps))

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Save the compressor in the checkpoint."""
        save_compression(given["model"], self._checkpoint(args, state) / FOLDER)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Restore it where training goes on from a checkpoint; hear what the model is told."""
        attachment_of(given["model"]).hear_owner()  # TRL's give it a forward of their own
        if state.global_step > 0:
            folder = self._resume_from or self._checkpoint(args, state)
            restore(given["model"], Path(folder) / FOLDER)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Restore that of the best checkpoint, if the trainer has just loaded it."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            restore(given["model"], Path(state.best_model_checkpoint) / FOLDER)

    @staticmethod
    def _checkpoint(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def restore(model: nn.Module, folder: Path) -> None:
    """Write saved parameters into those of a model that is compressed the same way.

    Raises:
        ConfigError: They do not fit.
    """
    from vispress.runtime.modules import held

    read_saved(folder).load_into(held(attachment_of(model).plan.adapter.base))
