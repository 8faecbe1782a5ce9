"""YOPO: compute less for visual tokens, in place of having fewer of them.

Zhang et al., "Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See",
arXiv:2410.06169.
Source: the official code (ZhangAIPI/YOPO_MLLM_Pruning, MIT), read through a specification.
Follows the code: in layers that have visual tokens, these go through the first `m / ffn_ratio` of
the FFN's m intermediate neurons, down(act(gate) * up); `inactive_heads` give them zeros, and the
prompt's text nothing of them, by weights that are set to zero behind the softmax and not
renormalised; of visual tokens they attend to a `window` around them in the grid, later ones too
(the block of visual tokens overwrites the causal mask), and to text as ever; from `layer` on they
are neither computed nor attended to. Else text goes through whole layers, as does what is decoded.
Positions stay. Inactive heads are found on samples (`visual_ratio`, `find_inactive_heads`); layers
0 and 1 keep all.
Differs: windows are off by default (published: 5 on LLaVA's 24 x 24, and 1 in the code for
Qwen2-VL), because FlashAttention takes no such mask. The rows of an answer attend to visual tokens
by all heads, taught as decoded. Visual tokens are removed from `layer` on, so attention is
renormalised there, as in the code for Qwen2-VL; that for LLaVA sets weights to zero behind the
softmax. What the code simulates by masks is saved where it can be: slices of the FFN's weights are
run. Heads are not, weights need the keys of all tokens; nor are windows, which are a dense mask
here as well, and are not counted as savings.
Reconstructed: `layer` of a 7B model, half of the depth as for 13B (24 of 28 for Qwen2-VL); windows
of what is no single square: each image, AnyRes crop and video frame is a grid of its own, whose
tokens do not attend to those of another, and newlines count as text.
The neurons are the first ones, not chosen: a model that was not trained so loses half of its FFN at
random. Published (LLaVA-1.5-7B, 7.63 to 1.91 TFLOPs: GQA 61.6 of 62.3, TextVQA 56.3 of 58.1, POPE
86.8 of 87.3) are models that were fine-tuned with all four parts on. The authors train the language
model and the projector at 2e-5.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vispress.budget import PUBLISHED_DEPTH, Budget, scaled_layer
from vispress.checks import check_ascending, check_flag, check_integer, check_number
from vispress.errors import ConfigError
from vispress.methods.base import Compressor, Evidence, keep_none, upcast
from vispress.methods.compute_pruner import ComputePruner, LayerCompute
from vispress.registry import register_method
from vispress.types import Placement, Positions, Stage, TokenPlan, VisualTokens

DENSE: Final = 2
"""First layers whose heads are all active."""
MAJORITY: Final = 0.4
"""A head is active in more than this share of samples."""


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
        inactive_heads: For each decoder layer, the heads that visual tokens have no part in,
            ascending (see `find_inactive_heads`); None for no head. They save no time here, and
            images must come in the first call on a KV cache.
        window: Side, in tokens, of the square around a visual token in which it attends to visual
            tokens, odd; published 5. None for all before it. It saves no time here, needs SDPA or
            eager attention, and images must come in the first call on a KV cache.
        causal: Whether a visual token attends only to those in its window that stand before it, as
            a model that was not trained with windows does; else to later ones too, as published.

    Raises:
        BudgetError: A budget is given.
        ConfigError: A value is out of range, there are fewer layers, or `causal` has no `window`.
        UnsupportedModelError: The FFNs are not gated ones of three projections (experts, say), or
            FlashAttention is to run windows.
    """

    summary: ClassVar[str] = "all at a part of each FFN, then none from half of the LLM's depth"
    paper: ClassVar[str] = "Zhang et al., 2024, arXiv:2410.06169"
    evidence: ClassVar[Evidence] = "read"
    takes_budget: ClassVar[bool] = False
    default_positions: ClassVar[Positions] = "original"

    ffn_ratio: int = 2
    layer: int | None = None
    inactive_heads: tuple[tuple[int, ...], ...] | None = None
    window: int | None = None
    causal: bool = False

    def validate(self) -> None:
        check_integer("ffn_ratio", self.ffn_ratio, low=1)
        check_flag("causal", self.causal)
        if self.window is not None:
            check_integer("window", self.window, low=1)
            if self.window % 2 == 0:
                raise ConfigError(
                    f"window must be odd, a square with the token in its middle, got {self.window}"
                )
        elif self.causal:
            raise ConfigError(
                "causal=True says what is seen of a window, and window is None, which is causal "
                "already; set window (5 as published), or leave causal out"
            )
        if self.layer is not None:
            check_integer("layer", self.layer, low=1)
        layers = () if self.inactive_heads is None else self.inactive_heads
        if not isinstance(layers, tuple):
            raise ConfigError(
                f"inactive_heads must be a tuple with the heads of each layer, got {layers!r}"
            )
        for number, heads in enumerate(layers):
            if heads != ():
                check_ascending(f"inactive_heads[{number}]", heads, low=0)

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

    def _check_heads(self, num_layers: int) -> None:
        if self.inactive_heads is not None and len(self.inactive_heads) != num_layers:
            raise ConfigError(
                f"inactive_heads must have an entry for each of {num_layers} decoder layers, got "
                f"{len(self.inactive_heads)}"
            )

    def compute(self, num_layers: int) -> tuple[LayerCompute, ...]:
        """Give what is computed in the layers that have visual tokens; others are whole."""
        self._check_heads(num_layers)
        heads = ((),) * num_layers if self.inactive_heads is None else self.inactive_heads
        part = partial(
            LayerCompute, ffn_ratio=self.ffn_ratio, window=self.window, causal=self.causal
        )
        end = self._end(num_layers)
        computed = tuple(part(inactive_heads=own) for own in heads[:end])
        return computed + (LayerCompute(),) * (num_layers - end)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        """Place what is computed in all layers, and the end of visual tokens."""
        inside = Placement(stage=Stage.COMPUTE, budget=Budget(keep_ratio=1.0))
        end = self._end(num_layers)
        self._check_heads(num_layers)
        if end == num_layers:
            return (inside,)
        none = Placement(stage=Stage.IN_LLM, budget=Budget(num_tokens=0), layer=end)
        return (inside, none)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        return keep_none(tokens)


def visual_ratio(
    attention: Float[Tensor, "*LH Q S"], visual: Bool[Tensor, "S"]
) -> Float[Tensor, "*LH"]:
    """Weigh what heads take of visual tokens against what they take of all others.

    Args:
        attention: Post-softmax weights of the rows of an answer, one sample; of one layer or more.
        visual: Which keys are visual tokens.

    Returns:
        The sums over rows, one by the other, in at least fp32.
    """
    by_key = upcast(attention).sum(-2)
    return by_key[..., visual].sum(-1) / by_key[..., ~visual].sum(-1)


def find_inactive_heads(
    ratios: Sequence[Float[Tensor, "L H"]], threshold: float
) -> tuple[tuple[int, ...], ...]:
    """Find the heads of each layer that do not look at visual tokens, by samples.

    A head is active in a sample whose ratio is above the threshold, and active if that holds in
    more than 40 % of the samples; the first two layers keep all. Published thresholds, each from
    100 samples: 0.2, 0.077 and 0.035 for LLaVA-1.5-13B (10, 20 and 30 of 40 heads stay, as a mean
    over layers), 0.07 for Qwen2-VL-7B.

    Args:
        ratios: Of each sample, `visual_ratio` of all layers and heads.
        threshold: At least 0.

    Raises:
        ConfigError: There is no sample, or the threshold is out of range.
    """
    check_number("threshold", threshold, low=0.0)
    if not ratios:
        raise ConfigError("inactive heads are found on samples, got none")
    active = (torch.stack([*ratios]) > threshold).double().mean(0) > MAJORITY
    active[:DENSE] = True
    return tuple(tuple((~row).nonzero()[:, 0].tolist()) for row in active)
