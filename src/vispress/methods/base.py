"""What every compression method is: hyper-parameters, placements, and a rule that makes a plan."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from functools import lru_cache, wraps
from typing import Any, ClassVar, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vispress.budget import Budget, Rounding, check_ratio, ratio_for_mean
from vispress.checks import check_layer as check_layer
from vispress.errors import BudgetError, ConfigError
from vispress.kinds import Evidence as Evidence
from vispress.kinds import Softens
from vispress.methods.cache_evictor import CacheEvictor
from vispress.methods.cached_selector import CachedSelector
from vispress.methods.compute_pruner import ComputePruner
from vispress.methods.encoder_merger import EncoderMerger
from vispress.methods.encoder_pooler import EncoderPooler
from vispress.methods.gist_evictor import GistEvictor
from vispress.methods.pair_masker import PairMasker
from vispress.methods.ranking import descending as descending
from vispress.methods.ranking import top_indices as top_indices
from vispress.methods.ranking import top_per_segment as top_per_segment
from vispress.methods.segment_shares import segment_shares as segment_shares
from vispress.types import (
    ModuleShape,
    Need,
    Placement,
    Positions,
    Signal,
    Stage,
    TokenPlan,
    VisualTokens,
)

Made = TypeVar("Made")

BUDGETS = ("keep_ratio", "num_tokens", "mean_keep_ratio")
"""Fields of which at most one is given."""


@dataclass(frozen=True, kw_only=True)
class Compressor(ABC):
    """A compression method with its hyper-parameters; immutable, holds no tensors.

    Args:
        keep_ratio: Fraction of visual tokens kept, in `(0, 1]`.
        num_tokens: Visual tokens kept per image, at least 1.
        mean_keep_ratio: In-LLM methods: the fraction kept as a mean over decoder layers.

    Raises:
        BudgetError: More than one budget, or one out of its range.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for tables: what is kept, and why."""
    paper: ClassVar[str]
    """Short citation with arXiv id, or "control", "composition" or "own"."""
    evidence: ClassVar[Evidence] = "own"
    """What it follows, in the words of `vispress.kinds.EVIDENCE`."""
    reads: ClassVar[frozenset[Signal]] = frozenset()
    rounding: ClassVar[Rounding] = "round"
    exact: ClassVar[bool] = True
    """False: `plan` may keep another count than asked (grids, adaptive counts) and reports it."""
    takes_budget: ClassVar[bool] = True
    """False: what is kept is fixed (nothing, say), and a budget is refused."""
    needs: ClassVar[Need | None] = None
    """What the method is made for: a model without it is refused. `"video"`: images pass whole."""
    merges: ClassVar[bool] = False
    """True: survivors do not keep their own values."""
    whole: ClassVar[bool] = False
    """True: acts on images of which no token is gone, so nothing may drop any before it."""
    trained: ClassVar[bool] = False
    """True: has parameters, which `make_module` makes."""
    untrained: ClassVar[str] = "its choice means nothing"
    """What it does with the parameters that it begins with, for reports; where it is trained."""
    gates: ClassVar[bool] = False
    """True: plans of SKIP placements may have a `TokenPlan.gate`."""
    softens: ClassVar[Softens | None] = None
    """What `TokenPlan.soft` does in training: its log joins the attention logits of the tokens as
    keys, from the placement's layer on, or it multiplies them. None: no plan has it."""
    default_positions: ClassVar[Positions] = "compact"

    keep_ratio: float | None = None
    num_tokens: int | None = None
    mean_keep_ratio: float | None = None

    def __post_init__(self) -> None:
        given = list(self.given_budget())
        if given and not self.takes_budget:
            raise BudgetError(
                f"{self.name} takes no {given[0]}, got {getattr(self, given[0])!r}: what it keeps "
                "is fixed; leave the budget out"
            )
        if len(given) > 1:
            raise BudgetError(f"give one budget, got {' and '.join(given)}")
        for field in ("keep_ratio", "mean_keep_ratio"):
            if (value := getattr(self, field)) is not None:
                check_ratio(field, value)
        if self.num_tokens is not None:
            Budget(num_tokens=self.num_tokens)
            if self.num_tokens < 1:
                raise BudgetError(f"num_tokens must be at least 1, got {self.num_tokens}")
        self.validate()
        for inner in self.members():
            if inner.trained:
                raise ConfigError(
                    f"{self.name} cannot hold {inner.name}, which has parameters of its own; give "
                    "both in a chain: method=[...]"
                )

    def validate(self) -> None:  # noqa: B027  (optional to fill in, not abstract)
        """Check own hyper-parameters; raise `ConfigError` naming the value and its range."""

    def given_budget(self) -> dict[str, Any]:
        """Find the budget that was given, by its field; empty for none."""
        return {f: value for f in BUDGETS if (value := getattr(self, f)) is not None}

    @property
    def unbudgeted(self) -> bool:
        """Whether no budget is given; methods that can then let the image decide the count."""
        return not self.given_budget()

    def members(self) -> tuple["Compressor", ...]:
        """List the compressors that this one is composed of; none for a plain method."""
        return ()

    def views(self) -> tuple["Compressor", ...]:
        """List compressors inside that are each shown `VisualTokens.views` of their own."""
        return ()

    def uncapturable(self) -> str | None:
        """Say why a prefill is no fixed sequence of operations, as CUDA graphs are; None if it is.

        It is where all that comes next follows from the prompt's layout, and the host reads nothing
        of pictures, texts or parameters. Decoding is captured in any case.
        """
        return next((why for one in self.members() if (why := one.uncapturable())), None)

    def whole_only(self) -> bool:
        """Whether this instance, or one inside it, acts on whole images only."""
        return self.whole or any(member.whole_only() for member in self.members())

    def signals(self) -> frozenset[Signal]:
        """Name what this instance reads (hyper-parameters may swap one of `reads` for another)."""
        return self.reads

    def encoder_layers(self, num_layers: int, feature_layer: int) -> tuple[int, ...]:
        """Choose encoder layers whose attention is read, 0-based: the feature layer by default."""
        return (feature_layer,)

    def make_module(self, shape: ModuleShape) -> nn.Module | None:
        """Make the method's parameters, fresh and as if by one seed; None where it has none.

        What `plan` calls as `VisualTokens.module`. Its layers are not `nn.Linear`, which adapters
        of PEFT would wrap, and widen their inputs (`upcast`), so that the precision of the model
        moves no ranking.

        Args:
            shape: Sizes of the model.
        """
        return None

    def at(self, progress: float) -> "Compressor":
        """Give the method's settings at a share of training, in `[0, 1]`: itself, unless scheduled.

        Of the same class, and made from these settings alone: nothing is remembered.
        """
        return self

    @abstractmethod
    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        """Say where the method acts in an LLM of `num_layers` decoder layers, ascending.

        Raises:
            BudgetError: No budget is set and the method has no published schedule.
            ConfigError: A layer is out of range.
        """

    @abstractmethod
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        """Decide for a bucket of images.

        Never called with `num_keep >= N` (the identity), unless the placement is adaptive.
        """

    def encoder_merger(self) -> EncoderMerger | None:
        """What merges inside the encoder's layers; None where the method does not."""
        return self if isinstance(self, EncoderMerger) else None

    def encoder_pooler(self) -> EncoderPooler | None:
        """What pools windows between the encoder's layers; None where the method does not."""
        return self if isinstance(self, EncoderPooler) else None

    def changes_encoder(self) -> bool:
        """Whether the vision encoder computes otherwise under this method."""
        return self.encoder_merger() is not None or self.encoder_pooler() is not None

    def cached_selector(self) -> CachedSelector | None:
        """What chooses among cached tokens while decoding; None where the method does not."""
        return self if isinstance(self, CachedSelector) else None

    def pair_masker(self) -> PairMasker | None:
        """What masks (text row, visual token) pairs; None where the method masks none."""
        return self if isinstance(self, PairMasker) else None

    def cache_evictor(self) -> CacheEvictor | None:
        """What evicts from the KV cache behind a prefill; None where the method does not."""
        return self if isinstance(self, CacheEvictor) else None

    def gist_evictor(self) -> GistEvictor | None:
        """What has tokens that stand for images; None where the method has none."""
        return self if isinstance(self, GistEvictor) else None

    def compute_pruner(self) -> ComputePruner | None:
        """What lets layers compute less for visual tokens; None where the method does not."""
        return self if isinstance(self, ComputePruner) else None

    def budget(self, num_layers: int, layer: int = 0) -> Budget:
        """Make the single budget of a method with one placement before `layer`.

        Raises:
            BudgetError: None is set, or the mean cannot be reached.
        """
        if self.mean_keep_ratio is not None:
            ratio = ratio_for_mean(self.mean_keep_ratio, layer, num_layers)
            return Budget(keep_ratio=ratio, rounding=self.rounding)
        if self.keep_ratio is None and self.num_tokens is None:
            raise BudgetError(
                f"{self.name} needs a budget: give keep_ratio in (0, 1] or num_tokens"
            )
        return Budget(
            keep_ratio=self.keep_ratio, num_tokens=self.num_tokens, rounding=self.rounding
        )

    def before_llm(self, num_layers: int) -> tuple[Placement, ...]:
        """Place a method that acts once, before the LLM, and needs no budget."""
        budget = Budget(keep_ratio=1.0) if self.unbudgeted else self.budget(num_layers)
        return (Placement(stage=Stage.PRE_LLM, budget=budget, adaptive=self.unbudgeted),)

    def hyperparameters(self) -> dict[str, Any]:
        """Collect field values, for YAML and reports."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True)
class ScorePruner(Compressor):
    """A method that scores tokens and keeps the best: only `score` is to be written."""

    per_segment: ClassVar[bool] = False
    """True: the budget is split over sub-images and frames; newline tokens are kept (NL-KEEP)."""

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Rate each token, higher = kept, fp32. NaN counts as the lowest."""

    @final
    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        """Keep the `num_keep` best; ties keep the earlier token."""
        score = self.score(tokens)
        if not self.per_segment or not tokens.segmented:
            return TokenPlan(keep=top_indices(score, num_keep))
        return TokenPlan(keep=top_per_segment(score, tokens.segments(), num_keep))


def remembered(make: Callable[..., Made]) -> Callable[..., Made]:
    """Keep what a function of plain values makes: host tensors, which nobody may change.

    They are normal tensors, which gradients may need, even if first asked for in inference mode.
    """

    @lru_cache(maxsize=32)
    def made(*values: Hashable) -> Made:
        with torch.inference_mode(False), torch.device("cpu"):
            return make(*values)

    return wraps(make)(made)


def keep_none(tokens: VisualTokens) -> TokenPlan:
    """Drop every token of a bucket."""
    none = torch.empty(tokens.batch, 0, dtype=torch.int64, device=tokens.features.device)
    return TokenPlan(keep=none)


def upcast(x: Tensor) -> Tensor:
    """Widen half types to fp32; fp64 stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
