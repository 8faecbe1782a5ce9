"""VisionSelector: two linear maps, trained by the answer's loss, score tokens against their mean.

Zhu et al., "VisionSelector: End-to-End Learnable Visual Token Compression for Efficient Multimodal
LLMs", arXiv:2510.16598.
Source: the official code (JulietChoo/VisionSelector), read through a specification, and vectors
that it computed.
Follows the code: with k = W_k x + b_k and q = W_q x + b_q of D / 2 channels, a token's score is the
mean over j of q_i . k_j / sqrt(D / 2), which is q_i . mean(k) / sqrt(D / 2); floor(budget N) tokens
stay, one at least. In training all stay, times a mask: the sigmoid of score + t, with the t that
lets the mask sum up to the budget, and its gradient. The loss gains a weight times the binary
cross-entropy of mask and hard choice; the weight grows linearly from 0.1 to 2 over training.
Differs: each image has its own budget, and its own mean of keys (the code pools all images of a
call, of one sample); the mask is made at the budget that is asked for. Weights begin normal with a
variance of 1e-4, biases at zero.
On Qwen3-VL, what DeepStack adds to visual tokens in early layers is not masked in training.
The model stays frozen: the authors train for an epoch at 20 % (5e-5, cosine), and use it at other
budgets. Their checkpoints hold the whole model; `official_weights` finds the module's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vispress.budget import Rounding
from vispress.checks import check_number
from vispress.errors import ConfigError
from vispress.kinds import Softens
from vispress.methods._parts.networks.layers import Dense
from vispress.methods._parts.scoring.soft_choice import with_sum
from vispress.methods.base import Compressor, Evidence, top_indices
from vispress.precision import full_precision
from vispress.registry import register_method
from vispress.types import ModuleShape, Placement, Positions, Stage, TokenPlan, VisualTokens

_DEVIATION = 0.01
_OFFICIAL = "importance_scorer."
_KINDS = ("weight", "bias")


class ImportanceScorer(nn.Module):
    """Score tokens by how their queries fit the mean of all keys.

    Args:
        width: Of the tokens; queries and keys have half of it, at least one channel.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half = max(1, width // 2)
        # not q_proj and k_proj, which lists of LoRA's targets name: PEFT would refuse them
        self.query, self.key = (Dense(width, half, zero=True) for _ in range(2))
        for one in (self.query, self.key):
            nn.init.normal_(one.weight, std=_DEVIATION)

    def forward(self, features: Float[Tensor, "B N D"]) -> Float[Tensor, "B N"]:
        """Score tokens, in at least fp32; any range."""
        with full_precision():
            query, key = self.query(features), self.key(features).mean(dim=1, keepdim=True)
            score: Tensor = (query * key).sum(dim=-1) / query.shape[-1] ** 0.5
        return score


def official_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Find the scorer's parameters among an official checkpoint's, named as the module's.

    Args:
        tensors: By name; those of interest end as `importance_scorer.q_proj.weight` does.

    Raises:
        ConfigError: One is missing.
    """
    parts = {"query": "q_proj", "key": "k_proj"}
    wanted = {f"{own}.{kind}": f"{part}.{kind}" for own, part in parts.items() for kind in _KINDS}
    found = {
        name.rpartition(_OFFICIAL)[2]: value for name, value in tensors.items() if _OFFICIAL in name
    }
    missing = [name for name in wanted.values() if name not in found]
    if missing:
        raise ConfigError(f"the checkpoint has no parameter that ends in {_OFFICIAL}{missing[0]}")
    return {own: found[name] for own, name in wanted.items()}


@final
@register_method("vision_selector")
@dataclass(frozen=True, kw_only=True)
class VisionSelector(Compressor):
    """Prune before the LLM, by scores that the answer's loss has trained.

    Args:
        weight: Of what pulls the mask towards a hard choice, where training begins; at least 0.
        end_weight: The same where it ends.

    Raises:
        ConfigError: A weight is out of range.
    """

    summary: ClassVar[str] = "what trained scores choose, query by mean key"
    paper: ClassVar[str] = "Zhu et al., 2025, arXiv:2510.16598"
    evidence: ClassVar[Evidence] = "code"
    rounding: ClassVar[Rounding] = "floor"
    trained: ClassVar[bool] = True
    softens: ClassVar[Softens | None] = "features"
    default_positions: ClassVar[Positions] = "original"

    weight: float = 0.1
    end_weight: float = 2.0

    def validate(self) -> None:
        for name in ("weight", "end_weight"):
            check_number(name, getattr(self, name), low=0.0, high=1e6)

    def at(self, progress: float) -> "VisionSelector":
        """The weight moves linearly."""
        return replace(self, weight=self.weight + (self.end_weight - self.weight) * progress)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def make_module(self, shape: ModuleShape) -> ImportanceScorer:
        return ImportanceScorer(shape.width)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.module is not None  # `trained`
        score: Tensor = tokens.module(tokens.features)
        keep = top_indices(score.detach(), num_keep)
        if not tokens.training:
            return TokenPlan(keep=keep)
        mask = with_sum(score, num_keep)
        mask = mask.clamp(min=torch.finfo(mask.dtype).tiny, max=1.0)
        hard = torch.zeros_like(mask).scatter(1, keep, 1.0)
        apart = nn.functional.binary_cross_entropy(mask, hard, reduction="none").mean(dim=1)
        return TokenPlan(keep=keep, soft=mask, losses={"vision_selector": self.weight * apart})
