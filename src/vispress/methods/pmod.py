"""p-MoD: in each layer a learned router lets some visual tokens run, fewer the deeper it lies.

Zhang et al., "p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay", ICCV 2025,
arXiv:2412.04449.
Source: the official code (MCG-NJU/p-MoD, Apache-2.0), read through a specification, and vectors
that it computed.
Follows the paper: the share of tokens that run decays along a shifted cosine, R_l = cos(pi l / (L -
1)) / 2 + beta; layers above `high` are dense, no share is below `low`. A router a layer gives a
logit a token, g = h w + b, and the weight 1 + scale tanh(g) (TanhNorm). Symmetric reweighting
(STRing): a token that runs leaves with h + attention + weight MLP, one that does not with weight h;
both train the router. Text runs everywhere. Positions stay; while decoding nothing is routed, and
each layer attends to what it cached.
Follows the code, not the paper: counts are floors; routers begin at zero, so that training begins
at a model in which the weights are 1; `decay="linear"`, 1/2 + beta - l / (L - 1), and shares that
do not decay; `norm="sigmoid"` or `"softmax"` (over an image) in place of tanh.
Differs: fp32 logits rank, not weights in the model's precision, where most of them tie; ties keep
the earlier token; each image has its own share (the code counts those of a sample as one) and keeps
a token at least; the cosine ends at the last layer (the code has 31, whatever the depth). Routing
of text, or of high-resolution crops alone, is not offered.
Untrained it keeps the first tokens of an image, in every layer: the published results (GQA 62.2 of
61.9, TextVQA 44.8 of 46.0 at 53.8 % of the KV cache, LLaVA-1.5-7B) are those of a model that was
fine-tuned with it, language model and projector included. Nobody ships weights for models of
transformers. The authors train all at 2e-5; in short runs the routers want 20 times as much
(`vispress.parameter_groups`).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vispress.budget import Budget, Rounding, check_ratio
from vispress.checks import check_choice
from vispress.errors import BudgetError, ConfigError
from vispress.methods.base import Compressor, Evidence, top_indices, upcast
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

Decay = Literal["cosine", "linear", "deep", "interleaved"]
Norm = Literal["tanh", "sigmoid", "softmax"]
_STEPS = 60


class Router(nn.Module):
    """A logit a token; zero at first.

    Args:
        width: Of the tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, features: Float[Tensor, "*B D"]) -> Float[Tensor, "*B"]:
        """Rate tokens in at least fp32, on their device (layers may lie on several)."""
        x = upcast(features)
        logits: Tensor = nn.functional.linear(x, self.weight.to(x)[None], self.bias.to(x))
        return logits[..., 0]


class Routers(nn.Module):
    """One router a layer.

    Args:
        width: Of the tokens.
        layers: Decoder layers that have one.
    """

    def __init__(self, width: int, layers: tuple[int, ...]) -> None:
        super().__init__()
        for layer in layers:
            self.add_module(str(layer), Router(width))

    def forward(self, features: Float[Tensor, "*B D"], layer: int) -> Float[Tensor, "*B"]:
        """Rate tokens in front of a decoder layer."""
        logits: Tensor = self.get_submodule(str(layer))(features)
        return logits


@final
@register_method("pmod")
@dataclass(frozen=True, kw_only=True)
class PMoD(Compressor):
    """Let a learned choice of tokens run in each layer; the others bypass it, reweighted.

    `keep_ratio` is the mean over decoder layers, as `mean_keep_ratio`: the schedule is shifted to
    it (a layer at the edge of `high` takes what is missing; a mean below `low` is the share of
    every layer). `num_tokens` is what runs in each routed layer of the schedule.

    Args:
        beta: Without a budget: shift of the schedule, its mean before bounds.
        high: Layers with a larger share are dense, in `(0, 1]`.
        low: Least share, in `(0, high]`.
        decay: `"cosine"` or `"linear"` in depth; or no decay, the share `beta` in `"deep"` layers
            (all but the first two and the last) or `"interleaved"` ones (every other).
        norm: What makes a weight of a logit, beside `scale` and `shift`.
        scale: Factor on it; above 0.
        shift: Weight where it is 0.
    """

    summary: ClassVar[str] = "what a learned router a layer chooses; the others bypass the layer"
    paper: ClassVar[str] = "Zhang et al., ICCV 2025, arXiv:2412.04449"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.DEPTH})
    rounding: ClassVar[Rounding] = "floor"
    trained: ClassVar[bool] = True
    untrained: ClassVar[str] = "the first tokens of an image run"
    gates: ClassVar[bool] = True
    default_positions: ClassVar[Positions] = "original"

    beta: float = 0.5
    high: float = 0.85
    low: float = 0.15
    decay: Decay = "cosine"
    norm: Norm = "tanh"
    scale: float = 0.2
    shift: float = 1.0

    def validate(self) -> None:
        check_ratio("high", self.high)
        check_ratio("low", self.low)
        if self.low > self.high:
            raise ConfigError(f"low must be at most high={self.high}, got {self.low}")
        check_choice("decay", self.decay, get_args(Decay))
        check_choice("norm", self.norm, get_args(Norm))
        for name in ("beta", "scale", "shift"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ConfigError(f"{name} must be a number above 0, got {value!r}")

    def shares(self, num_layers: int) -> tuple[float, ...]:
        """Give the share of tokens that runs in each decoder layer; 1 in dense ones.

        Raises:
            BudgetError: No shift of the schedule has the mean that is asked for.
        """
        mean = self.mean_keep_ratio if self.keep_ratio is None else self.keep_ratio
        if mean is None:
            return self._shifted(self.beta, num_layers, self.low)
        low = min(self.low, mean)
        below, above = -1.0, 2.0
        for _ in range(_STEPS):
            middle = (below + above) / 2
            reached = math.fsum(self._shifted(middle, num_layers, low)) >= mean * num_layers
            below, above = (below, middle) if reached else (middle, above)
        less, more = (self._shifted(beta, num_layers, low) for beta in (below, above))
        excess = math.fsum(more) - mean * num_layers
        found = list(more)
        for layer in range(num_layers):  # those that turn dense at this very shift
            spare = min(excess, more[layer] - less[layer])
            found[layer] -= spare
            excess -= spare
        if excess > 1e-9:
            raise BudgetError(
                f"a mean of {mean} over {num_layers} layers cannot be reached with "
                f"decay={self.decay!r}: its dense layers alone leave "
                f"{math.fsum(more) / num_layers:.3f}; ask for more, or let the share decay"
            )
        return tuple(round(share, 12) for share in found)  # counts are floors: 0.5 is no 0.4999

    def _shifted(self, beta: float, num_layers: int, low: float) -> tuple[float, ...]:
        depths = [layer / max(1, num_layers - 1) for layer in range(num_layers)]
        if self.decay == "cosine":
            curve = [math.cos(math.pi * depth) / 2 + beta for depth in depths]
        elif self.decay == "linear":
            curve = [0.5 - depth + beta for depth in depths]
        else:
            deep = self.decay == "deep"
            chosen = range(2, num_layers - 1) if deep else range(1, num_layers, 2)
            curve = [beta if layer in chosen else 1.0 for layer in range(num_layers)]
        return tuple(1.0 if share > self.high else max(share, low) for share in curve)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        shares = self.shares(num_layers)
        routed = [layer for layer in range(num_layers) if shares[layer] < 1.0]
        if min(shares) == 1.0 and not self.unbudgeted:  # all are kept: the last says so
            routed = [num_layers - 1]
        return tuple(
            Placement(
                stage=Stage.SKIP, budget=self._budget(shares[layer]), layer=layer, until=layer + 1
            )
            for layer in routed
        )

    def _budget(self, share: float) -> Budget:
        if self.num_tokens is not None:
            return Budget(num_tokens=self.num_tokens)
        return Budget(keep_ratio=share, rounding=self.rounding)

    def make_module(self, shape: ModuleShape) -> Routers:
        layers = (placement.layer for placement in self.placements(shape.num_layers))
        return Routers(shape.width, tuple(layers))

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.module is not None  # `trained`
        assert tokens.depth is not None  # declared in `reads`
        logits: Tensor = tokens.module(tokens.features, tokens.depth[0])
        keep = top_indices(logits.detach(), num_keep)
        normed = logits.softmax(-1) if self.norm == "softmax" else getattr(logits, self.norm)()
        return TokenPlan(keep=keep, gate=self.shift + self.scale * normed, bypassed="gated")
