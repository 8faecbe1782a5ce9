"""Gamma-MoD: one learned router lets half of the visual tokens run in layers that can spare them.

Luo et al., "gamma-MoD: Exploring Mixture-of-Depth Adaptation for Multimodal Large Language Models",
ICLR 2025, arXiv:2410.13859.
Source: the official code (Yaxin9Luo/Gamma-MOD, MIT), read through a specification, and vectors that
it computed.
Follows the paper: layers whose attention maps have a low rank (`arank`) become MoD layers; for
LLaVA-HR-7B these are all but the first three and the last, the default here (scaled by depth). One
router is shared by all of them: p = softmax(W LN(h))_1 of two logits, without a bias, on the hidden
states behind the layer's input norm. Those of the highest p run, a share `capacity` does not; a
token that runs leaves with h + attention + p MLP, one that does not as it came. The loss gains
`loss_weight` times the cross-entropy of the logits against what was selected, a mean over tokens,
a sum over layers, so that p can be compared with a threshold.
Follows the code: of N tokens floor(capacity N) are left out; those that run have contiguous
positions in the layer.
Differs: visual tokens alone are routed and weighted, each image for itself (the code also routes
and weights the prompt's first 35 tokens, and weights protected text); all decoded tokens run; the
choice in inference is that of training, unless `threshold` is given (the code has 0.005). W begins
as `nn.Linear` begins it, from a seed of its own.
Untrained the MLPs of chosen tokens count about half: the published results (LLaVA-HR-7B 57.6 of
58.5 over four tasks at half the tokens) are those of a model that was fine-tuned with it, all of it
at 2e-5. Its weights fit the models of the authors' code, and not this one.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vispress.budget import Budget, Rounding, check_ratio, scaled_layer
from vispress.checks import check_ascending
from vispress.errors import BudgetError, ConfigError
from vispress.methods.base import Compressor, Evidence, check_layer, top_indices, upcast
from vispress.registry import register_method
from vispress.types import (
    ModuleShape,
    Placement,
    Positions,
    Signal,
    Stage,
    TokenPlan,
    VisualTokens,
)

_FIRST = 3
"""Of 32 layers; the last one stays as it is, too."""


def arank(attention: Float[Tensor, "H N N"]) -> Float[Tensor, "H"]:
    """Rank each head's attention map without its diagonal and what lies above it.

    The mean over heads and prompts is what a layer is chosen by: a low one can spare tokens.

    Args:
        attention: Post-softmax weights of one layer and prompt; computed in fp32.
    """
    ranks: Tensor = torch.linalg.matrix_rank(attention.float().tril(diagonal=-1))
    return ranks.float()


class SharedRouter(nn.Module):
    """Two logits a token, the second for running.

    Args:
        width: Of the tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, width))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, normed: Float[Tensor, "*B D"]) -> Float[Tensor, "*B 2"]:
        """Rate normalised tokens in at least fp32, on their device."""
        x = upcast(normed)
        logits: Tensor = x @ self.weight.to(x).mT
        return logits


@final
@register_method("gamma_mod")
@dataclass(frozen=True, kw_only=True)
class GammaMoD(Compressor):
    """Let one learned choice of tokens run in layers that can spare the others.

    `keep_ratio` is the mean over decoder layers, as `mean_keep_ratio`; `num_tokens` is what runs in
    each MoD layer.

    Args:
        capacity: Without a budget: share of an image's tokens that a MoD layer leaves out, in
            `(0, 1)`.
        layers: MoD layers, ascending, from 1 on (see `arank`); None for all but the first three
            of 32, scaled, and the last.
        loss_weight: Of the routers' loss, at least 0.
        threshold: Tokens of a higher p run, however many; None for the highest. In `(0, 1)`.
    """

    summary: ClassVar[str] = "what a learned router chooses, where layers can spare the others"
    paper: ClassVar[str] = "Luo et al., ICLR 2025, arXiv:2410.13859"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.INPUT_NORM})
    rounding: ClassVar[Rounding] = "ceil"
    trained: ClassVar[bool] = True
    gates: ClassVar[bool] = True
    default_positions: ClassVar[Positions] = "compact"

    capacity: float = 0.5
    layers: tuple[int, ...] | None = None
    loss_weight: float = 0.01
    threshold: float | None = None

    def validate(self) -> None:
        for name in ("capacity", "threshold"):
            value = getattr(self, name)
            if name == "threshold" and value is None:
                continue
            check_ratio(name, value)
            if value == 1:
                raise ConfigError(f"{name} must be below 1, got {value!r}")
        if self.layers is not None:
            check_ascending("layers", self.layers, low=1)
        weight = self.loss_weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
            raise ConfigError(f"loss_weight must be a number of at least 0, got {weight!r}")
        if self.threshold is not None and not self.unbudgeted:
            raise ConfigError(
                f"threshold={self.threshold} decides how many run; leave out a budget"
            )

    def uncapturable(self) -> str | None:
        return None if self.threshold is None else "images decide how many tokens run a layer"

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        layers = self.layers
        if layers is None:
            layers = tuple(range(scaled_layer(_FIRST, num_layers), num_layers - 1))
        if not layers:
            raise ConfigError(f"{self.name} needs at least 3 decoder layers, got {num_layers}")
        check_layer("layers", layers[-1], num_layers)
        budget, adaptive = self._budget(len(layers) / num_layers), self.threshold is not None
        return tuple(
            Placement(
                stage=Stage.SKIP, budget=budget, layer=layer, until=layer + 1, adaptive=adaptive
            )
            for layer in layers
        )

    def _budget(self, routed: float) -> Budget:
        """The budget of each MoD layer, which are a share of all."""
        if self.threshold is not None:
            return Budget(keep_ratio=1.0)
        if self.num_tokens is not None:
            return Budget(num_tokens=self.num_tokens)
        mean = self.mean_keep_ratio if self.keep_ratio is None else self.keep_ratio
        ratio = 1 - self.capacity if mean is None else round(1 - (1 - mean) / routed, 12)
        if ratio <= 0:
            raise BudgetError(
                f"a mean of {mean} cannot be reached: the layers that are no MoD layers alone "
                f"leave {1 - routed:.3f}; ask for more, or name more `layers`"
            )
        return Budget(keep_ratio=ratio, rounding=self.rounding)

    def make_module(self, shape: ModuleShape) -> SharedRouter:
        return SharedRouter(shape.width)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.module is not None  # `trained`
        assert tokens.input_norm is not None  # declared in `reads`
        logits: Tensor = tokens.module(tokens.input_norm(upcast(tokens.features)))
        p = logits.softmax(-1)[..., 1]
        if self.threshold is None:
            keep = top_indices(p.detach(), num_keep)
            runs = torch.zeros_like(p, dtype=torch.int64).scatter(1, keep, 1)
        else:
            runs = (p.detach() > self.threshold).long()
        entropy = nn.functional.cross_entropy(logits.mT, runs, reduction="none").mean(1)
        return TokenPlan(
            keep=keep if self.threshold is None else tuple(row.nonzero()[:, 0] for row in runs),
            gate=p,
            losses={"gamma_mod": self.loss_weight * entropy},
        )
