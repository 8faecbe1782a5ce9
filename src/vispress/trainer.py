"""transformers' `Trainer` with what compressors ask of a loop; a plain one works, too."""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from vispress.api import attachment_of, compression_report
from vispress.checks import check_number
from vispress.errors import CompressionStateError, ConfigError
from vispress.training import CompressionCallback, answer_divergence, compression_loss


def is_compressed(model: nn.Module) -> bool:
    """Tell whether a model is compressed."""
    try:
        attachment_of(model)
    except CompressionStateError:
        return False
    return True


class CompressionTrainer(Trainer):  # type: ignore[misc]
    """Train a compressed model: its methods' losses, rates, schedules and checkpoints.

    What methods add to the loss is added, also under gradient accumulation; a `CompressionCallback`
    is there (progress, checkpoints, resume). Logs gain each method's loss, `loss/NAME`, a mean over
    micro-batches since the last log, and `mean_keep_ratio`, of the last micro-batch, over layers.

    Args:
        model: A compressed model, possibly wrapped by PEFT.
        modules_lr: Learning rate of the methods' parameters; None for that of the others.
        teacher: The uncompressed model, a copy of its own, whose answers are to be met: their
            divergence (`answer_divergence`) is added to the loss, and logged as `loss/divergence`.
            It sees the same batches without their VoCo tokens. None for no teacher.
        teacher_weight: Of the divergence, at least 0.
        **given: As `Trainer` takes them.

    Raises:
        CompressionStateError: The model is not compressed.
        ConfigError: The rate is no number above 0, the weight one below, or the teacher compressed.
    """

    def __init__(
        self,
        model: nn.Module,
        *given: Any,
        modules_lr: float | None = None,
        teacher: nn.Module | None = None,
        teacher_weight: float = 1.0,
        **named: Any,
    ):
        attachment_of(model)
        if modules_lr is not None:
            check_number("modules_lr", modules_lr, low=1e-12, high=1e6)
        check_number("teacher_weight", teacher_weight, low=0.0)
        if teacher is not None and is_compressed(teacher):
            raise ConfigError("teacher must be uncompressed: load the model a second time")
        self.modules_lr = modules_lr
        self.teacher, self.teacher_weight = teacher, teacher_weight
        self._losses: dict[str, list[Tensor]] = {}
        super().__init__(model, *given, **named)
        attachment_of(self.model).hear_owner()  # TRL's give the model a forward of their own
        if not any(isinstance(c, CompressionCallback) for c in self.callback_handler.callbacks):
            self.add_callback(CompressionCallback())

    def create_optimizer(self, *given: Any, **named: Any) -> torch.optim.Optimizer:
        """Make the trainer's optimiser, and give the methods' parameters groups of their own."""
        from vispress.runtime.modules import held

        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*given, **named)
        module = held(attachment_of(self.model).plan.adapter.base)
        if not fresh or module is None or self.modules_lr is None:
            return optimizer
        own = {id(parameter) for parameter in module.parameters()}
        for group in list(optimizer.param_groups):
            methods = [p for p in group["params"] if id(p) in own]
            group["params"] = [p for p in group["params"] if id(p) not in own]
            if methods:
                settings = {k: v for k, v in group.items() if k != "params"}
                optimizer.add_param_group(settings | {"params": methods, "lr": self.modules_lr})
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Add what methods add, while training."""
        from vispress.runtime.forward.owner import telling_labels

        # a loss outside of the model keeps labels from it, and prompts end in front of these
        labels, count = inputs.get("labels"), num_items_in_batch
        told, wanted = telling_labels(labels), return_outputs or self.teacher is not None
        if not model.training:
            with told:
                return super().compute_loss(model, inputs, return_outputs, count)
        with told, compression_loss(model) as extra:
            found = super().compute_loss(model, inputs, wanted, count)
            loss, outputs = found if wanted else (found, None)
            added, parts = extra(), dict(extra.tensors)
        if self.teacher is not None:
            parts["divergence"] = self._divergence(self.teacher, inputs, labels, outputs)
            added = added + self.teacher_weight * parts["divergence"].to(added)
        for name, value in parts.items():
            self._losses.setdefault(name, []).append(value.detach())
        # a loss over all tokens of an update is not divided by its micro-batches behind this
        whole = (self.model_accepts_loss_kwargs and count is not None) or self.compute_loss_func
        if whole:
            added = added / self.current_gradient_accumulation_steps
        loss = loss + added.to(loss)
        return (loss, outputs) if return_outputs else loss

    def _divergence(
        self, teacher: nn.Module, inputs: dict[str, Any], labels: Tensor | None, outputs: Any
    ) -> Tensor:
        """How far the answers of a batch are from the teacher's."""
        logits = outputs.get("logits")
        if labels is None or logits is None:
            raise ConfigError("a teacher needs batches with labels, and a loss that keeps logits")
        given = {name: value for name, value in inputs.items() if name != "labels"}
        token = attachment_of(self.model).plan.gist_token
        if token is not None:
            mask = given.get("attention_mask", torch.ones_like(given["input_ids"]))
            given["attention_mask"] = mask.masked_fill(given["input_ids"] == token, 0)
        with torch.no_grad():
            theirs = teacher.to(logits.device).eval()(**given).logits
        return answer_divergence(logits, labels, theirs)

    def log(self, logs: dict[str, float], *given: Any, **named: Any) -> None:
        """Add the methods' losses, and what was kept."""
        if "loss" in logs:
            for name, values in self._losses.items():
                logs[f"loss/{name}"] = round(float(torch.stack(values).mean()), 6)
            self._losses.clear()
            with suppress(CompressionStateError):  # there was no image yet
                logs["mean_keep_ratio"] = round(compression_report(self.model).mean_keep_ratio, 4)
        super().log(logs, *given, **named)
