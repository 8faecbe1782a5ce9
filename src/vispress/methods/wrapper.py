"""Wrappers: compressors around another one, that change what it sees or keeps, where it acts."""

from dataclasses import dataclass, replace

from vispress.errors import BudgetError, ConfigError
from vispress.methods.base import Compressor
from vispress.methods.cached_selector import CachedSelector
from vispress.methods.compute_pruner import ComputePruner
from vispress.methods.pair_masker import PairMasker
from vispress.registry import get_method
from vispress.types import Placement, Signal

_INHERITED = ("rounding", "exact", "takes_budget", "needs", "merges", "default_positions")
"""What a class says about itself, and a wrapper says as the compressor inside does."""


@dataclass(frozen=True, kw_only=True)
class Wrapper(Compressor):
    """A compressor that acts where another one does, with its signals and meaning of budgets.

    There is one budget: given to the wrapper or to the inner compressor, it is kept in the wrapper.

    Args:
        inner: The wrapped compressor, or a method's name for its defaults.

    Raises:
        BudgetError: Both have a budget.
        ConfigError: `inner` is no compressor.
    """

    inner: Compressor | str

    def __post_init__(self) -> None:
        inner = get_method(self.inner)() if isinstance(self.inner, str) else self.inner
        if not isinstance(inner, Compressor):
            raise ConfigError(
                f"{self.name}: inner must be a compressor or a method's name, got {inner!r}"
            )
        for name in _INHERITED:
            object.__setattr__(self, name, getattr(inner, name))
        given, own = inner.given_budget(), self.given_budget()
        if given and own:
            raise BudgetError(f"{self.name}: give one budget, got {own} here and {given} inside")
        for name, value in given.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "inner", replace(inner, **dict.fromkeys(given)))
        super().__post_init__()
        _ = self.acting  # a budget that `inner` refuses is refused here

    @property
    def wrapped(self) -> Compressor:
        """The inner compressor, without the budget."""
        assert isinstance(self.inner, Compressor)  # since `__post_init__`
        return self.inner

    @property
    def acting(self) -> Compressor:
        """The inner compressor with the budget."""
        return replace(self.wrapped, **self.given_budget())

    @property
    def root(self) -> Compressor:
        """The innermost compressor."""
        return self.wrapped.root if isinstance(self.wrapped, Wrapper) else self.wrapped

    def nested(self) -> tuple[Compressor, ...]:
        """List the inner compressor, the one inside it, and so on."""
        deeper = self.wrapped.nested() if isinstance(self.wrapped, Wrapper) else ()
        return (self.wrapped, *deeper)

    @property
    def adaptive(self) -> bool:
        """Whether the image decides the count."""
        return getattr(self.wrapped, "adaptive", False)

    def members(self) -> tuple[Compressor, ...]:
        return (self.wrapped,)

    def views(self) -> tuple[Compressor, ...]:
        return self.wrapped.views()

    def signals(self) -> frozenset[Signal]:
        return self.wrapped.signals()

    def encoder_layers(self, num_layers: int, feature_layer: int) -> tuple[int, ...]:
        return self.wrapped.encoder_layers(num_layers, feature_layer)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        try:
            return self.acting.placements(num_layers)
        except BudgetError as error:
            raise BudgetError(f"{self.name}: {error}") from error

    def cached_selector(self) -> CachedSelector | None:
        """Take the inner compressor's: what decoding sees is no matter of budgets or signals."""
        return self.acting.cached_selector()

    def pair_masker(self) -> PairMasker | None:
        """Take the inner compressor's, likewise."""
        return self.acting.pair_masker()

    def compute_pruner(self) -> ComputePruner | None:
        """Take the inner compressor's, likewise."""
        return self.acting.compute_pruner()
