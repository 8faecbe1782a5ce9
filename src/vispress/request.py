"""Work out what is asked of a model: compressors, their budget, and whether it can give signals."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vispress.adapters.base import ModelAdapter
from vispress.chain import Chain
from vispress.config import Config, changed_compressor, load_config, make_compressor
from vispress.errors import BudgetError, ConfigError, UnsupportedMethodError
from vispress.methods.base import Compressor
from vispress.methods.encoder_merger import EncoderMerger
from vispress.methods.encoder_pooler import EncoderPooler
from vispress.registry import get_method, list_methods
from vispress.types import CLS_SIGNALS, Positions
from vispress_kernels import Backend

Method = str | Compressor


@dataclass(frozen=True)
class Request:
    """What `compress_model` was asked for, before anything is bound to a model.

    Args:
        methods: The chain of compressors, as given.
        mean: The mean that all of it is to keep, or None where its parts bring their own budgets.
        positions: As given.
        backend: As given.
        progress: How far training is, if that was said: methods may follow a schedule.
        cache_layouts: Whether what prompts of one layout have in common is kept.

    Raises:
        ConfigError: There are no such positions or kernels.
    """

    methods: tuple[Compressor, ...]
    mean: float | None = None
    positions: Positions | None = None
    backend: Backend = "auto"
    progress: float | None = None
    cache_layouts: bool = True

    def __post_init__(self) -> None:
        if self.positions not in (None, "original", "compact"):
            raise ConfigError(f"positions must be 'original' or 'compact', got {self.positions!r}")
        if self.backend not in ("auto", "torch", "triton"):
            raise ConfigError(f"backend must be 'auto', 'torch' or 'triton', got {self.backend!r}")

    @property
    def names(self) -> str:
        """The methods, for messages."""
        return ", ".join(method.name for method in self.methods)

    def at(self, progress: float | None) -> tuple[Compressor, ...]:
        """Give the chain at a share of training; as given where none is said."""
        return self.methods if progress is None else tuple(m.at(progress) for m in self.methods)

    def moved(self, progress: float) -> "Request":
        """Move to a share of training."""
        return replace(self, progress=progress)

    def changed(self, given: dict[str, Any]) -> "Request":
        """Take new budgets and hyper-parameters.

        Args:
            given: By name; a budget takes the place of the one before.

        Raises:
            BudgetError: None or several budgets, or one out of range.
            ConfigError: A hyper-parameter is unknown or out of range, or cannot be given to a
                chain.
        """
        if not given:
            raise BudgetError(
                "nothing to update: give keep_ratio, num_tokens, mean_keep_ratio or a "
                f"hyper-parameter of {self.names}"
            )
        if len(self.methods) == 1 and self.mean is None:
            return replace(self, methods=(changed_compressor(self.methods[0], given),))
        if self.mean is not None and set(given) == {"mean_keep_ratio"}:
            return replace(self, mean=given["mean_keep_ratio"])
        can = "its parts have budgets of their own" if self.mean is None else "only that can change"
        raise ConfigError(
            f"{', '.join(given)} cannot be updated in a chain ({self.names}): a chain is updated "
            f"by the mean_keep_ratio that it shares, and {can}; call remove_compression(model), "
            "then compress_model with the new parts"
        )


def resolve(
    method: Method | Sequence[Method] | None,
    config: Config | None,
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
        if isinstance(part, type) and issubclass(part, Compressor):
            raise ConfigError(
                f"method must be a compressor, got its class; write {part.__name__}"
                f"(keep_ratio=0.25), or its name, {part.name!r}, and keep_ratio=0.25"
            )
        if not isinstance(part, Compressor):
            raise ConfigError(f"method must be a name or a compressor, got {type(part).__name__}")
    return chain, mean


def check_signals(method: Compressor, adapter: ModelAdapter) -> None:
    """Refuse a method whose input or signals this model cannot give, with what would work.

    Raises:
        UnsupportedMethodError: Names them.
    """
    if (gap := signal_gap(method, adapter)) is not None:
        works = ", ".join(_working(adapter))
        raise UnsupportedMethodError(f"{gap} Methods that work on this model: {works}")


def signal_gap(method: Compressor, adapter: ModelAdapter) -> str | None:
    """Say which input or signal a method needs that this model cannot give; None if there is none.

    What would do in its place is said, too.
    """
    if method.needs is not None and method.needs not in adapter.kinds:
        has = {"anyres": "cuts no images into AnyRes crops", "video": "reads no videos"}
        return (
            f"{method.name} is made for {method.needs} input, but {adapter.family} "
            f"{has[method.needs]}."
        )
    missing = method.signals() - adapter.signals()
    if not missing:
        return None
    names = ", ".join(sorted(signal.value for signal in missing))
    gap = f"{method.name} needs {names}, which {adapter.family} cannot give"
    if not missing <= CLS_SIGNALS:
        return f"{gap}."
    gap += " (its vision encoder has no [CLS] token)."
    if "scores" in method.hyperparameters():
        gap += " The documented substitute is scores='column_mean'."
    return gap


def _working(adapter: ModelAdapter) -> list[str]:
    """Methods that need nothing that this model lacks."""
    return [
        name
        for name in list_methods()
        if (cls := get_method(name)).reads <= adapter.signals()
        and (cls.needs is None or cls.needs in adapter.kinds)
        and (not issubclass(cls, EncoderMerger) or adapter.encoder_blocks())
        and (not issubclass(cls, EncoderPooler) or adapter.encoder_grids("image", {}) is not None)
    ]
