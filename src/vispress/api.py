"""The public functions: compress a model in place, report on it, undo it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from vispress.adapters.base import ModelAdapter, find_adapter
from vispress.chain import Chain, share_mean
from vispress.config import load_config, make_compressor
from vispress.errors import (
    BudgetError,
    CompressionStateError,
    ConfigError,
    UnsupportedMethodError,
)
from vispress.methods.base import Compressor
from vispress.methods.encoder_merger import EncoderMerger
from vispress.registry import get_method, list_methods
from vispress.report import CompressionReport, build_report
from vispress.types import CLS_SIGNALS, Positions
from vispress.versions import check_versions
from vispress_kernels import Backend

M = TypeVar("M", bound=nn.Module)
Method = str | Compressor


def compress_model(
    model: M,
    method: Method | Sequence[Method] | None = None,
    *,
    keep_ratio: float | None = None,
    num_tokens: int | None = None,
    config: str | Path | None = None,
    positions: Positions | None = None,
    backend: Backend = "auto",
    **hyperparameters: Any,
) -> M:
    """Compress the visual tokens of a Hugging Face multimodal LLM, in place.

    Afterwards `forward`, `generate`, training and pipelines are used as before: inputs, logits and
    cache lengths stay those of the full sequence, while inside each decoder layer only the kept
    rows are computed and stored.

    Args:
        model: A supported model, possibly wrapped (PEFT, sharded, quantised); see `vispress
            doctor`.
        method: A registered name, a compressor, or a list of either (a chain: each acts on what
            the one before has left).
        keep_ratio: Fraction of visual tokens kept by one placement, in `(0, 1]`. Methods with a
            published schedule read it as the mean over decoder layers.
        num_tokens: Visual tokens kept per image, in place of `keep_ratio`.
        config: A YAML file, in place of `method` and its hyper-parameters.
        positions: `"original"` keeps position ids of survivors (gaps remain), `"compact"`
            renumbers them. By default each method follows its official code.
        backend: Kernels: `"triton"`, plain `"torch"`, or what fits the device (`"auto"`).
        **hyperparameters: Fields of the method's class, `layer=2` for example. Of a list only
            `mean_keep_ratio`: see `vispress.chain`.

    Returns:
        The same model.

    Raises:
        BudgetError: Both or neither of the budgets, or one out of range.
        UnsupportedModelError: No adapter knows the model, or one of its settings is not supported.
        UnsupportedMethodError: Unknown method, or one that needs a signal this model cannot give.
        ConfigError: A hyper-parameter is unknown or out of range.
        CompressionStateError: The model is compressed already.
        UnsupportedVersionError: torch or transformers is outside the supported range.
    """
    methods, mean = _resolve(method, config, keep_ratio, num_tokens, hyperparameters)
    if positions not in (None, "original", "compact"):
        raise ConfigError(f"positions must be 'original' or 'compact', got {positions!r}")
    if backend not in ("auto", "torch", "triton"):
        raise ConfigError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
    check_versions()
    adapter = find_adapter(model)

    from vispress.runtime.attachment import ATTRIBUTE, Attachment
    from vispress.runtime.forward.owner import find_owner
    from vispress.runtime.hooks.head_shards import find_shards
    from vispress.runtime.plan.placements import bind_placements
    from vispress.runtime.plan.plan import Plan
    from vispress.runtime.plan.refusals import refuse_partitioned, refuse_sharded_encoder
    from vispress.runtime.stages import bind_all
    from vispress.runtime.stages.base import Binding
    from vispress.runtime.tokens.masks import check_implementation

    if ATTRIBUTE in adapter.base.__dict__:
        current = ", ".join(m.name for m in adapter.base.__dict__[ATTRIBUTE].methods)
        raise CompressionStateError(
            f"the model is already compressed by {current}; call remove_compression(model) first"
        )
    check_implementation(adapter.language_model.config._attn_implementation)
    for one in methods:
        _check_signals(one, adapter)
    notes: list[str] = []
    if mean is not None:
        methods, note = share_mean(methods, mean, len(adapter.decoder_layers))
        notes.append(note)
    placements, remarks = bind_placements(methods, adapter, positions)
    notes += remarks
    stages = bind_all(Binding(adapter, methods, placements, notes, backend))
    layer: Any = adapter.decoder_layers[0]
    shards = find_shards(model, layer.self_attn)
    plan = Plan(adapter, methods, placements, backend, notes, shards)
    refuse_sharded_encoder(model, plan)
    refuse_partitioned(adapter.base)
    Attachment(plan, stages, find_owner(model, adapter.base)).attach()
    return model


def remove_compression(model: M) -> M:
    """Undo `compress_model`; the model is bit-identical to before.

    Raises:
        CompressionStateError: The model is not compressed.
    """
    _attachment(model).detach()
    return model


@contextmanager
def compressed(
    model: nn.Module, method: Method | Sequence[Method] | None = None, **options: Any
) -> Iterator["ReportView"]:
    """`compress_model` for the length of a `with` block.

    Args:
        model: As in `compress_model`.
        method: As in `compress_model`.
        **options: As in `compress_model`.

    Yields:
        A view that reads like the report of the last prefill (and keeps the last one afterwards).
    """
    compress_model(model, method, **options)
    view = ReportView(model)
    try:
        yield view
    finally:
        view._close()
        remove_compression(model)


def compression_report(model: nn.Module) -> CompressionReport:
    """What the last prefill kept, and where.

    Raises:
        CompressionStateError: The model is not compressed, or saw no visual tokens yet.
    """
    record = _attachment(model).record
    if record is None:
        raise CompressionStateError(
            "no report yet: the model saw no visual tokens since it was compressed"
        )
    return build_report(record)


class ReportView:
    """Reads like the `CompressionReport` of the model's last prefill, at the time of reading."""

    def __init__(self, model: nn.Module) -> None:
        self._model: nn.Module | None = model
        self._last: CompressionReport | None = None

    def _close(self) -> None:
        if self._model is not None and _attachment(self._model).record is not None:
            self._last = compression_report(self._model)
        self._model = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.report, name)

    @property
    def report(self) -> CompressionReport:
        """The report itself.

        Raises:
            CompressionStateError: No visual tokens were seen.
        """
        if self._model is not None:
            return compression_report(self._model)
        if self._last is None:
            raise CompressionStateError("no report: the model saw no visual tokens in the block")
        return self._last

    def __str__(self) -> str:
        return str(self.report)


def _attachment(model: nn.Module) -> Any:
    from vispress.runtime.attachment import ATTRIBUTE

    base = find_adapter(model).base
    if ATTRIBUTE not in base.__dict__:
        raise CompressionStateError("the model is not compressed; call compress_model first")
    return base.__dict__[ATTRIBUTE]


def _resolve(
    method: Method | Sequence[Method] | None,
    config: str | Path | None,
    keep_ratio: float | None,
    num_tokens: int | None,
    hyperparameters: dict[str, Any],
) -> tuple[list[Compressor], float | None]:
    """The chain of compressors that the arguments name, and the mean that all of it is to keep."""
    budgets = {"keep_ratio": keep_ratio, "num_tokens": num_tokens}
    given = {k: v for k, v in budgets.items() if v is not None} | hyperparameters
    if (method is None) == (config is None):
        raise ConfigError("give either method or config")
    source: Any = load_config(config) if config is not None else method
    if isinstance(source, str):
        return [make_compressor(source, **given)], None
    whole = isinstance(source, list | tuple)
    mean = given.pop("mean_keep_ratio", None) if whole else None
    if isinstance(source, Chain) and source.mean_keep_ratio is not None:
        if mean is not None:
            raise BudgetError(f"give one budget, got mean_keep_ratio={mean} and that of the file")
        mean = source.mean_keep_ratio
    parts = list(source) if isinstance(source, list | tuple) else [source]
    if not parts:
        raise ConfigError("method is an empty list; name at least one")
    if given:
        raise ConfigError(
            f"{', '.join(given)} cannot be given beside a compressor, a list or a config file; "
            "set it there (the mean_keep_ratio of a whole list can be given)"
        )
    chain = [make_compressor(part) if isinstance(part, str) else part for part in parts]
    for part in chain:
        if not isinstance(part, Compressor):
            raise ConfigError(f"method must be a name or a compressor, got {type(part).__name__}")
    return chain, mean


def _check_signals(method: Compressor, adapter: ModelAdapter) -> None:
    """Refuse a method whose input or signals this model cannot give, with what would work."""
    if method.needs is not None and method.needs not in adapter.kinds:
        has = {"anyres": "cuts no images into AnyRes crops", "video": "reads no videos"}
        raise UnsupportedMethodError(
            f"{method.name} is made for {method.needs} input, but {adapter.family} "
            f"{has[method.needs]}. Methods that work on this model: {', '.join(_working(adapter))}"
        )
    missing = method.signals() - adapter.signals()
    if not missing:
        return
    names = ", ".join(sorted(signal.value for signal in missing))
    works = _working(adapter)
    hint = ""
    if missing <= CLS_SIGNALS and "scores" in method.hyperparameters():
        hint = " The documented substitute is scores='column_mean'."
    raise UnsupportedMethodError(
        f"{method.name} needs {names}, which {adapter.family} cannot give (its vision encoder "
        "has no [CLS] "
        f"token).{hint} Methods that work on this model: {', '.join(works)}"
        if missing <= CLS_SIGNALS
        else f"{method.name} needs {names}, which {adapter.family} cannot give. "
        f"Methods that work on this model: {', '.join(works)}"
    )


def _working(adapter: ModelAdapter) -> list[str]:
    """Methods that need nothing that this model lacks."""
    return [
        name
        for name in list_methods()
        if (cls := get_method(name)).reads <= adapter.signals()
        and (cls.needs is None or cls.needs in adapter.kinds)
        and (not issubclass(cls, EncoderMerger) or adapter.encoder_blocks())
    ]
