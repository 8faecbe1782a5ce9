"""What a harness passes on to `compress_model`, and what the compressed model did, added up."""

import difflib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from torch import nn

from vispress.adapters.base import find_adapter
from vispress.api import compress_model, compression_report
from vispress.config import load_config, make_compressor
from vispress.errors import ConfigError
from vispress.model_folders import check_folder, load_part, skeleton
from vispress.registry import get_method
from vispress.report import CompressionReport
from vispress.yaml_files import parse_yaml

UNCOMPRESSED: Final = "none"
_CALL: Final = ("positions", "backend")
PICTURES: Final = ("pixel_values", "pixel_values_videos")


@dataclass(frozen=True)
class Compression:
    """A checked choice of method; `None` leaves the model as it is.

    Args:
        method: As in `compress_model`: a compressor or a chain.
        call: Its other arguments, `positions` and `backend`.
        label: For logs and names of runs.
    """

    method: Any
    call: Mapping[str, Any]
    label: str

    def apply(self, model: nn.Module) -> None:
        """Compress a model in place; see `compress_model` for the errors."""
        if self.method is not None:
            compress_model(model, self.method, **self.call)

    def check(self, pretrained: str, **options: Any) -> None:
        """Try it on a model without weights, so that what cannot work fails before they are read.

        Args:
            pretrained: Folder or hub id; only its configuration is read.
            **options: For `AutoConfig.from_pretrained`.

        Raises:
            CheckpointError: The configuration cannot be reached or read, or the folder holds code
                or weights that are not loaded; see `vispress.model_folders`.
            VispressError: As `compress_model`.
        """
        from transformers import AutoConfig

        if Path(pretrained).is_dir():
            check_folder(Path(pretrained), pretrained)
        if self.method is not None:
            self.apply(skeleton(load_part(AutoConfig, pretrained, pretrained, **options)))


def read_compression(given: Mapping[str, Any], others: Iterable[str] = ()) -> Compression:
    """Check what a user gave as `key=value` arguments.

    Args:
        given: `method` (a name, or `"none"` for the uncompressed baseline) or `config` (a YAML
            file), budget and hyper-parameters of the method, `positions`, `backend`. Words are
            read as YAML where a hyper-parameter is meant.
        others: Names that the harness's own model takes, for suggestions.

    Raises:
        ConfigError: Neither or both of `method` and `config`, or an unknown key or value.
        UnsupportedMethodError: Unknown method.
        BudgetError: Both budgets, or one out of range.
    """
    values = {key: value for key, value in given.items() if value is not None}
    method, config = values.pop("method", None), values.pop("config", None)
    if (method is None) == (config is None):
        raise ConfigError(
            "give method=NAME or config=FILE.yaml; method=none is the uncompressed baseline"
        )
    call: dict[str, Any] = {key: values.pop(key) for key in _CALL if key in values}
    known = [] if method in (None, UNCOMPRESSED) else [f.name for f in fields(get_method(method))]
    for key in values:
        if key not in known:
            taken_by = f"method {method}" if config is None else f"config {config}"
            raise ConfigError(_unknown(key, taken_by, known, [*_CALL, *others]))
    if method == UNCOMPRESSED:
        if call:
            raise ConfigError(f"{', '.join(call)} given with method=none, which takes nothing")
        return Compression(None, {}, UNCOMPRESSED)
    if config is not None:
        return Compression(load_config(config), call, str(config))
    made = make_compressor(method, **{key: _parsed(value) for key, value in values.items()})
    label = "-".join([method, *(f"{key}={value}" for key, value in values.items())])
    return Compression(made, call, label)


def _unknown(key: str, taken_by: str, known: list[str], others: list[str]) -> str:
    close = difflib.get_close_matches(key, [*known, *others], n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    own = ", ".join(known) or "nothing"
    return f"unknown argument {key!r}{hint}; {taken_by} takes {own}, others: {', '.join(others)}"


def _parsed(value: Any) -> Any:
    return parse_yaml(value, f"the value {value!r}") if isinstance(value, str) else value


@dataclass
class Tally:
    """Visual tokens of all prompts that were answered, added up.

    Args:
        prompts: How many with pictures.
        visual: Visual tokens they had.
        end: Left at the last decoder layer.
        mean: Kept, as a mean over decoder layers.
        error: The first error while generating.
    """

    prompts: int = 0
    visual: int = 0
    end: int = 0
    mean: float = 0.0
    error: Exception | None = None

    def clear(self) -> None:
        """Begin anew."""
        self.__init__()  # type: ignore[misc]

    def add(self, report: CompressionReport) -> None:
        """Add one compressed prefill."""
        self.prompts += len(report.samples)
        for sample in report.samples:
            self.visual += sum(image.num_visual for image in sample.images)
            self.end += sum(image.num_kept for image in sample.images)
        self.mean += sum(map(sum, report.visual_per_layer)) / report.num_layers

    def add_plain(self, prompts: int, visual: int) -> None:
        """Add one uncompressed prefill."""
        self.prompts += prompts
        self.visual += visual
        self.end += visual
        self.mean += visual

    def count(self, model: nn.Module, compression: Compression, inputs: Mapping[str, Any]) -> None:
        """Add the prefill of a call that a model was just given, if it had pictures."""
        if not any(inputs.get(name) is not None for name in PICTURES):
            return
        if compression.method is not None:
            self.add(compression_report(model))
            return
        ids, placeholders = inputs["input_ids"], find_adapter(model).placeholders().values()
        visual = sum(int((ids == placeholder).sum()) for placeholder in placeholders)
        self.add_plain(len(ids), visual)

    def averages(self) -> dict[str, float]:
        """A prompt's visual tokens: had, kept at the end, kept as a mean over layers, its share."""
        prompts = max(1, self.prompts)
        return {
            "visual_tokens": self.visual / prompts,
            "kept_at_end": self.end / prompts,
            "kept_mean": self.mean / prompts,
            "kept_mean_ratio": self.mean / self.visual if self.visual else 1.0,
        }


def watch(model: Any, compression: Compression, tally: Tally) -> None:
    """Count what `model.generate` keeps, and remember its first error; on this object only.

    A harness may catch an error and go on with an empty answer, which would be scored as a wrong
    one: after an error every further call fails at once, and `tally.error` is there to be raised.
    """
    generate = model.generate

    @functools.wraps(generate)
    def watched(*arguments: Any, **inputs: Any) -> Any:
        if tally.error is not None:
            raise tally.error
        try:
            out = generate(*arguments, **inputs)
            tally.count(model, compression, inputs)
        except Exception as error:
            tally.error = error
            raise
        return out

    model.generate = watched
