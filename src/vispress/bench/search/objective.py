"""The value of a schedule on calibration questions: accuracy, loyalty or first-token KL."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import vispress
from vispress.adapters.base import find_adapter
from vispress.api import compression_report
from vispress.bench.model.batches import Batch, Memory, make_batches
from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.plan.cells import Cell
from vispress.bench.plan.provenance import commit, digest
from vispress.bench.run.applied_cell import apply_cell, changes_encoder
from vispress.bench.run.budget_check import check_budget
from vispress.bench.run.parts import Advance
from vispress.bench.search.notes import add_note, read_notes
from vispress.bench.tasks.task import check_tasks, get_task
from vispress.checks import check_choice, check_integer, check_number
from vispress.config import save_config, to_mapping
from vispress.flops import flops, visual_per_layer
from vispress.methods.base import Compressor

Metric = Literal["accuracy", "loyalty", "kl", "reverse_kl"]
_DIVERGENCES = ("kl", "reverse_kl")


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Compute KL(p || q) in nats of log-probabilities `[..., V]`, at least 0."""
    return (p.exp() * (p - q)).sum(dim=-1).clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """On what and how schedules are compared.

    Args:
        tasks: Names of tasks.
        metric: `"accuracy"`: mean score, tasks weighing the same. `"loyalty"`: share of answers
            that are word for word the uncompressed model's. `"kl"`: minus the mean divergence (in
            nats) of the first answer token from the uncompressed model's, KL(uncompressed ||
            compressed). `"reverse_kl"`: KL(compressed || uncompressed).
        questions: For each task, at least 1.
        seed: Of questions.
        batch_size: Prompts a batch.
        max_new_tokens: Longest answer.

    Raises:
        ConfigError: A value is out of range, or a task is unknown.
    """

    tasks: tuple[str, ...]
    metric: Metric = "kl"
    questions: int = 25
    seed: int = 0
    batch_size: int = 32
    max_new_tokens: int = 4

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, get_args(Metric))
        check_integer("seed", self.seed, low=0)
        for name in ("questions", "batch_size", "max_new_tokens"):
            check_integer(name, getattr(self, name), low=1)
        check_tasks(self.tasks)


class ScheduleObjective:
    """Values schedules on one model; remembers every value, in a file if there is one.

    Args:
        loaded: The model, uncompressed.
        calibration: Questions and metric.
        log: JSON lines of what was found, read again by a later run on the same model, questions
            and commit; None to keep nothing.
        advance: Progress, called with what is being done and how many questions were finished.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        calibration: Calibration,
        log: Path | None = None,
        advance: Advance = lambda _what, _questions: None,
    ) -> None:
        self.loaded, self.calibration, self.advance = loaded, calibration, advance
        adapter = find_adapter(loaded.model)
        self.num_layers = len(adapter.decoder_layers)
        self._text = loaded.model.config.get_text_config()
        self._placeholders = list(adapter.placeholders().values())
        self._batches: list[Batch] = []
        self._memory = Memory(loaded)
        self._log, self._known = log, dict(read_notes(log, self.identity))
        self._reference: list[Any] | None = None

    @property
    def identity(self) -> str:
        """Hash of everything that decides a value, but for the schedule."""
        decisive = {"weights": self.loaded.weights, "commit": commit()}
        decisive |= {"version": vispress.__version__, "dtype": str(self.loaded.model.dtype)}
        return digest(decisive | asdict(self.calibration))

    @property
    def batches(self) -> list[Batch]:
        """All questions."""
        if not self._batches:
            calibration = self.calibration
            for name in calibration.tasks:
                prompts = get_task(name).draw(calibration.questions, calibration.seed)
                self._batches += make_batches(self.loaded, name, prompts, calibration.batch_size)
        return self._batches

    @property
    def num_questions(self) -> int:
        """Over all tasks."""
        return self.calibration.questions * len(self.calibration.tasks)

    # --- values

    def value(self, method: Compressor, what: str = "") -> float:
        """Measure the metric under a compressor, higher is better.

        Args:
            method: Compresses.
            what: For progress.

        Raises:
            BudgetError: It kept another number of tokens than asked.
            ConfigError: It does not fit the model.
        """
        made = to_mapping(method)
        key = json.dumps(made, sort_keys=True)
        if key in self._known:
            self.advance(what, self.num_questions)
            return self._known[key]
        reference = self._uncompressed()
        cell = Cell(group=what or method.name, chain=(method,))
        value = self._mean(self._outputs(cell, what), reference)
        self._known[key] = value
        if self._log is not None:
            add_note(self._log, self.identity, made, value)
        return value

    @property
    def uncompressed(self) -> float:
        """The metric of the uncompressed model: 1 for loyalty, 0 for divergences."""
        return self._mean(self._uncompressed(), self._uncompressed())

    def least(self, tolerance: float) -> float:
        """Compute the value still good enough: a share of accuracy less, or so many nats."""
        check_number("tolerance", tolerance, low=0.0)
        whole = self.uncompressed
        return whole - tolerance * (1.0 if self.calibration.metric in _DIVERGENCES else whole)

    # --- costs

    def share_of_tokens(self, method: Compressor) -> float:
        """Compute a schedule's visual tokens, a mean over decoder layers, as a share of all."""
        return sum(self._left(method)) / self.num_layers / self.num_visual

    def share_of_flops(self, method: Compressor) -> float:
        """Compute a schedule's multiply-adds of visual tokens as a share of the uncompressed."""
        pruner = method.compute_pruner()
        layers = () if pruner is None else pruner.compute(self.num_layers)
        return self.flops_of(self._left(method), [own.ffn_share for own in layers] or None)

    def flops_of(
        self, tokens_per_layer: Sequence[float], mlp_shares: Sequence[float] | None = None
    ) -> float:
        """Compute the multiply-adds of a count of visual tokens a layer, as a share likewise."""
        size = (self._text.hidden_size, self._text.intermediate_size)
        whole = flops([self.num_visual] * self.num_layers, *size)
        own = flops(tokens_per_layer, *size, mlp_shares=mlp_shares)  # type: ignore[arg-type]
        return own / whole

    @property
    def num_visual(self) -> int:
        """Visual tokens of a prompt, their mean over all questions."""
        ids = [self._memory.inputs(batch)["input_ids"] for batch in self.batches]
        marks = torch.tensor(self._placeholders, device=self.loaded.device)
        return max(1, round(sum(int(torch.isin(x, marks).sum()) for x in ids) / self.num_questions))

    def _left(self, method: Compressor) -> tuple[int, ...]:
        placements = method.placements(self.num_layers)
        return visual_per_layer(self.num_visual, self.num_layers, placements)

    # --- runs

    def _uncompressed(self) -> list[Any]:
        if self._reference is None:
            self._reference = list(self._outputs(Cell(group="none"), "uncompressed"))
        return self._reference

    def _outputs(self, cell: Cell, what: str) -> Iterator[Any]:
        """Run every batch: answers, or log-probabilities `[B, V]` of first tokens on the host."""
        run = self._first_tokens if self.calibration.metric in _DIVERGENCES else self._answers
        for batch in self.batches:
            with (
                self._memory.shown(batch, anew=changes_encoder(cell)) as inputs,
                apply_cell(cell, self.loaded, batch.prompts, inputs) as now,
            ):
                out = run(batch, now.inputs)
                if cell.chain and any(prompt.visuals for prompt in batch.prompts):
                    check_budget(cell, compression_report(self.loaded.model))
            self.advance(f"{what}, {batch.task}", len(batch.prompts))
            yield out

    def _answers(self, batch: Batch, inputs: Any) -> list[str]:
        turns = self.loaded.converse(batch.prompts, inputs, self.calibration.max_new_tokens)
        return [" / ".join(answers) for answers in turns]

    @torch.inference_mode()
    def _first_tokens(self, batch: Batch, inputs: Any) -> Tensor:
        out = self.loaded.model.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        chances: Tensor = out.logits[0].float().log_softmax(dim=-1)
        return chances.cpu()

    def _mean(self, outputs: Iterable[Any], reference: Iterable[Any]) -> float:
        """Average over tasks the means over questions."""
        tasks: dict[str, list[float]] = {name: [] for name in self.calibration.tasks}
        for batch, output, whole in zip(self.batches, outputs, reference, strict=True):
            tasks[batch.task] += self._scores(batch, output, whole)
        return fmean(map(fmean, tasks.values()))

    def _scores(self, batch: Batch, output: Any, reference: Any) -> list[float]:
        if self.calibration.metric in _DIVERGENCES:
            pair = (reference, output) if self.calibration.metric == "kl" else (output, reference)
            return (-divergence(*pair)).tolist()
        if self.calibration.metric == "loyalty":
            return [float(a == b) for a, b in zip(output, reference, strict=True)]
        score = get_task(batch.task).score
        return [score(answer, prompt) for answer, prompt in zip(output, batch.prompts, strict=True)]


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """A schedule and what it is worth.

    Args:
        method: Takes the schedule to a model.
        value: Of the metric, on the calibration questions.
        uncompressed: The same of the uncompressed model.
        tokens: Mean over decoder layers, of all visual tokens.
        flops: In the decoder, of those of all visual tokens.
    """

    method: Compressor
    value: float
    uncompressed: float
    tokens: float
    flops: float

    @classmethod
    def of(cls, objective: ScheduleObjective, method: Compressor) -> "SearchResult":
        """Value a schedule by an objective, and size it."""
        return cls(
            method=method,
            value=objective.value(method, "found"),
            uncompressed=objective.uncompressed,
            tokens=objective.share_of_tokens(method),
            flops=objective.share_of_flops(method),
        )

    def save(self, path: Path, objective: ScheduleObjective, how: str) -> None:
        """Write the YAML that `compress_model(model, config=path)` takes, with its origin above."""
        calibration = objective.calibration
        origin = (
            f"vispress search {how}: {calibration.metric} {self.value:.4f}, uncompressed "
            f"{self.uncompressed:.4f}, at {100 * self.tokens:.1f} % of visual tokens and\n"
            f"{100 * self.flops:.1f} % of their FLOPs; {calibration.questions} questions each of "
            f"{', '.join(calibration.tasks)} (seed {calibration.seed}), {objective.loaded.name}"
        )
        save_config(self.method, path, origin=origin)
