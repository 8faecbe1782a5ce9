"""Random mix: some of the tokens that another method would keep are drawn at random instead.

Composition; between a method and the random control at equal budget. It shows how much of a
method's choice matters, and lets tokens in that the method never sees as important.
"""

from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from vispress.checks import check_integer, check_number
from vispress.devices import sent
from vispress.errors import ConfigError
from vispress.methods.base import Compressor, Evidence, top_indices
from vispress.methods.fastv import FastV
from vispress.methods.wrapper import Wrapper
from vispress.registry import register_method
from vispress.types import Placement, Signal, TokenPlan, VisualTokens


@final
@register_method("random_mix")
@dataclass(frozen=True, kw_only=True)
class RandomMix(Wrapper):
    """Let another method fill part of the budget, and draw the rest from what it leaves.

    Of a budget of K, `round(share K)` are drawn. Images with equally many tokens prefer the same
    places, at every stage, so that an image keeps what it would keep alone.

    Args:
        inner: A method that keeps tokens as they are, or its name.
        share: Of the kept tokens, in `[0, 1]`: 0 is the method itself, 1 is random.
        seed: Seed of a generator of its own on the host, at least 0.

    Raises:
        ConfigError: `inner` merges, or decides its own counts; or a value is out of its range.
    """

    summary: ClassVar[str] = "what another method keeps, a share of it drawn at random"
    paper: ClassVar[str] = "composition"
    evidence: ClassVar[Evidence] = "composition"
    reads: ClassVar[frozenset[Signal]] = FastV.reads

    inner: Compressor | str = field(default_factory=FastV)
    share: float = 0.1
    seed: int = 0

    def validate(self) -> None:
        check_number("share", self.share, low=0.0, high=1.0)
        check_integer("seed", self.seed, low=0)
        if self.merges or self.adaptive or not self.exact or not self.takes_budget:
            raise ConfigError(
                f"inner: {self.root.name} merges, or does not keep exactly what it is asked for; "
                "wrap a method that prunes to a budget"
            )

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        found = super().placements(num_layers)
        if any(placement.adaptive for placement in found):
            raise ConfigError(f"inner: {self.root.name} decides its own counts; give it a budget")
        return found

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        drawn = round(self.share * num_keep)
        if not drawn:
            return self.acting.plan(tokens, num_keep)
        priority = self._priority(tokens)
        if drawn == num_keep:
            return TokenPlan(keep=top_indices(priority, num_keep))
        chosen = self.acting.plan(tokens, num_keep - drawn).keep
        assert isinstance(chosen, Tensor)
        # priorities lie in [0, 1): what is chosen comes first
        return TokenPlan(keep=top_indices(priority.scatter(1, chosen, 2.0), num_keep))

    def _priority(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Draw a number for each place of the raster, the same on every device."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        drawn = torch.rand(tokens.num_original, generator=generator)
        return sent(drawn, tokens.features.device)[tokens.index]
