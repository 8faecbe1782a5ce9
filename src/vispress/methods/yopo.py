"""YOPO: compute less for visual tokens, in place of having fewer of them.

Zhang et al., "Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See",
arXiv:2410.06169.
Source: the official code (ZhangAIPI/YOPO_MLLM_Pruning, MIT), read through a specification.
Follows the code: in layers that have visual tokens, these go through the first `m / ffn_ratio` of
the FFN's m intermediate neurons, down(act(gate) * up); from `layer` on they are neither computed
nor attended to. Text, and what is decoded, goes through whole layers. Positions stay.
Differs: two of the four parts are here. Windows of visual attention and inactive heads are left
out. Visual tokens are removed from `layer` on, so attention is renormalised there, as in the code
for Qwen2-VL; that for LLaVA sets weights to zero behind the softmax. What the code simulates by
masks is saved here: slices of the FFN's weights are run.
Reconstructed: `layer` of a 7B model, half of the depth as for 13B (24 of 28 for Qwen2-VL).
The neurons are the first ones, not chosen: a model that was not trained so loses half of its FFN at
random. Published (LLaVA-1.5-7B, 7.63 to 1.91 TFLOPs: GQA 61.6 of 62.3, TextVQA 56.3 of 58.1, POPE
86.8 of 87.3) are models that were fine-tuned with all four parts on. The authors train the language
model and the projector at 2e-5.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from vispress.budget import PUBLISHED_DEPTH, Budget, scaled_layer
from vispress.checks import check_integer
from vispress.errors import ConfigError
from vispress.methods.base import Compressor, Evidence, keep_none
from vispress.methods.compute_pruner import ComputePruner, LayerCompute
from vispress.registry import register_method
from vispress.types import Placement, Positions, Stage, TokenPlan, VisualTokens


@final
@register_method("yopo")
@dataclass(frozen=True, kw_only=True)
class YOPO(Compressor, ComputePruner):
    """Send visual tokens through part of each FFN, and through the first layers alone.

    It takes no budget. Where a projection of the FFN is no plain `nn.Linear` (adapters, quantised
    or offloaded weights), all neurons are computed and those that are left out set to zero.

    Args:
        ffn_ratio: How many times fewer FFN neurons visual tokens go through, at least 1; 1 for
            all.
        layer: Decoder layer from which there are no visual tokens, in `[1, num_layers]`; the number
            of layers lets them stay. None for half of the depth.

    Raises:
        BudgetError: A budget is given.
        ConfigError: A value is out of range, or there are fewer layers.
        UnsupportedModelError: The FFNs are not gated ones of three projections (experts, say).
    """

    summary: ClassVar[str] = "all at a part of each FFN, then none from half of the LLM's depth"
    paper: ClassVar[str] = "Zhang et al., 2024, arXiv:2410.06169"
    evidence: ClassVar[Evidence] = "code"
    takes_budget: ClassVar[bool] = False
    default_positions: ClassVar[Positions] = "original"

    ffn_ratio: int = 2
    layer: int | None = None

    def validate(self) -> None:
        check_integer("ffn_ratio", self.ffn_ratio, low=1)
        if self.layer is not None:
            check_integer("layer", self.layer, low=1)

    def _end(self, num_layers: int) -> int:
        """The first layer without visual tokens."""
        if self.layer is None:
            return scaled_layer(PUBLISHED_DEPTH // 2, num_layers)
        if self.layer > num_layers:
            raise ConfigError(
                f"layer must be in [1, {num_layers}] for a model of {num_layers} decoder layers "
                f"({num_layers}: visual tokens stay), got {self.layer}"
            )
        return self.layer

    def compute(self, num_layers: int) -> tuple[LayerCompute, ...]:
        """Give the same part of the FFN in all layers that have visual tokens."""
        part, end = LayerCompute(ffn_ratio=self.ffn_ratio), self._end(num_layers)
        return (part,) * end + (LayerCompute(),) * (num_layers - end)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        """Place what is computed in all layers, and the end of visual tokens."""
        inside = Placement(stage=Stage.COMPUTE, budget=Budget(keep_ratio=1.0))
        end = self._end(num_layers)
        if end == num_layers:
            return (inside,)
        none = Placement(stage=Stage.IN_LLM, budget=Budget(num_tokens=0), layer=end)
        return (inside, none)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        return keep_none(tokens)
