"""transformers' `Trainer` with what compressors ask of a loop; a plain one works, too."""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from vispress.api import attachment_of, compression_report
from vispress.checks import check_number
from vispress.errors import CompressionStateError
from vispress.training import CompressionCallback, compression_loss


class CompressionTrainer(Trainer):  # type: ignore[misc]
    """Train a compressed model: its methods' losses, rates, schedules and checkpoints.

    What methods add to the loss is added, also under gradient accumulation; a `CompressionCallback`
    is there (progress, checkpoints, resume). Logs gain each method's loss, `loss/NAME`, a mean over
    micro-batches since the last log, and `mean_keep_ratio`, of the last micro-batch, over layers.

    Args:
        model: A compressed model, possibly wrapped by PEFT.
        modules_lr: Learning rate of the methods' parameters; None for that of the others.
        **given: As `Trainer` takes them.

    Raises:
        CompressionStateError: The model is not compressed.
        ConfigError: The rate is no number above 0.
    """

    def __init__(
        self, model: nn.Module, *given: Any, modules_lr: float | None = None, **named: Any
    ):
        attachment_of(model)
        if modules_lr is not None:
            check_number("modules_lr", modules_lr, low=1e-12, high=1e6)
        self.modules_lr = modules_lr
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
        told, count = telling_labels(inputs.get("labels")), num_items_in_batch
        if not model.training:
            with told:
                return super().compute_loss(model, inputs, return_outputs, count)
        with told, compression_loss(model) as extra:
            found = super().compute_loss(model, inputs, return_outputs, count)
            loss, outputs = found if return_outputs else (found, None)
            added, parts = extra(), extra.tensors
        for name, value in parts.items():
            self._losses.setdefault(name, []).append(value.detach())
        # a loss over all tokens of an update is not divided by its micro-batches behind this
        whole = (self.model_accepts_loss_kwargs and count is not None) or self.compute_loss_func
        if whole:
            added = added / self.current_gradient_accumulation_steps
        loss = loss + added.to(loss)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *given: Any, **named: Any) -> None:
        """Add the methods' losses, and what was kept."""
        if "loss" in logs:
            for name, values in self._losses.items():
                logs[f"loss/{name}"] = round(float(torch.stack(values).mean()), 6)
            self._losses.clear()
            with suppress(CompressionStateError):  # there was no image yet
                logs["mean_keep_ratio"] = round(compression_report(self.model).mean_keep_ratio, 4)
        super().log(logs, *given, **named)
