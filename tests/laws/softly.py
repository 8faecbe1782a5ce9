"""A method that is soft in training by a formula, and the oracle: float masks in the plain model.

Nothing of the library's runtime is used by the oracle, nor of the method: what tokens count, and
what that adds to the logits of their keys, is worked out here from the hidden states.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tests.laws.oracle import language_model, taken_off
from torch import Tensor, nn

from vispress.adapters.base import find_adapter
from vispress.budget import Budget
from vispress.kinds import Softens
from vispress.methods.base import Compressor, top_indices
from vispress.types import Placement, Positions, Stage, TokenPlan, VisualTokens


def rate(features: Tensor, sharpness: float) -> Tensor:
    """What tokens are ranked by; some lie far below what is clamped."""
    way = torch.arange(features.shape[-1], dtype=features.dtype).mul(1.7).cos()
    return sharpness * (features @ way)


@dataclass(frozen=True, kw_only=True)
class Softly(Compressor):
    """Keeps the half that rates highest before each of some layers; soft in training.

    Args:
        layers: Where it acts; 0 is before the LLM.
        sharpness: Of the rating.
        alike: Whether all tokens count whole.
    """

    name: ClassVar[str] = "softly"
    summary: ClassVar[str] = "a formula"
    paper: ClassVar[str] = "control"
    takes_budget: ClassVar[bool] = False
    softens: ClassVar[Softens | None] = "keys"
    default_positions: ClassVar[Positions] = "original"

    layers: tuple[int, ...] = (0, 2)
    sharpness: float = 1.0
    alike: bool = False

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return tuple(
            Placement(
                stage=Stage.IN_LLM if layer else Stage.PRE_LLM,
                budget=Budget(keep_ratio=0.5 ** (number + 1)),
                layer=layer,
            )
            for number, layer in enumerate(self.layers)
        )

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        rated = rate(tokens.features, self.sharpness)
        soft = torch.ones_like(rated) if self.alike else rated.sigmoid()
        return TokenPlan(keep=top_indices(rated.detach(), num_keep), soft=soft)


class SoftlyInSize(Softly):
    """The same, and tokens are multiplied by what they count."""

    softens: ClassVar[Softens | None] = "features"


def soft_logits(
    model: Any,
    inputs: Mapping[str, Any],
    method: Softly,
    documents: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Logits of the plain model with the formula in each layer (differentiable).

    Args:
        model: Not compressed.
        inputs: Its arguments, padded or packed.
        method: Whose formula.
        documents: `[B, L]`, number of the document at each position of packed rows, -1 on padding.
        window: Positions that each layer sees, itself included.
    """
    stack, ids = language_model(model), inputs["input_ids"]
    real = documents >= 0 if documents is not None else inputs["attention_mask"].bool()
    placeholders = tuple(find_adapter(model).placeholders().values())
    visual = torch.isin(ids, torch.tensor(placeholders)) & real
    length = ids.shape[1]
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        sees = sees.triu(1 - window)
    if documents is not None:
        sees = sees & (documents[:, :, None] == documents[:, None])
    own = torch.eye(length, dtype=torch.bool)
    allowed = ((sees & real[:, None]) | (own & ~real[:, :, None]))[:, None]
    added: list[Tensor] = []

    def starts(number: int) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden = args[0]
            if number in method.layers:
                soft = rate(hidden, method.sharpness).sigmoid()
                if method.softens == "features":
                    hidden = torch.where(visual[..., None], hidden * soft[..., None], hidden)
                else:
                    logs = torch.where(visual, soft, 1.0).log()
                    added.append(torch.where(logs < -10, torch.full_like(logs, -10.0), logs))
            bias = sum(added, torch.zeros(ids.shape, dtype=hidden.dtype))[:, None, None]
            least = torch.finfo(hidden.dtype).min
            return (hidden, *args[1:]), kwargs | {
                "attention_mask": torch.where(allowed, bias, least)
            }

        return hook

    handles = [
        layer.register_forward_pre_hook(starts(number), with_kwargs=True)
        for number, layer in enumerate(stack.layers)
    ]
    with taken_off(model, handles):
        return model(**{**inputs, "use_cache": False}).logits  # type: ignore[no-any-return]
