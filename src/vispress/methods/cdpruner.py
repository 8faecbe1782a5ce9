"""CDPruner: keep tokens that fit the question and differ from each other (a conditional DPP).

Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in
MLLMs", NeurIPS 2025, arXiv:2506.10967.
Source: https://github.com/Theia-4869/CDPruner at 9541616 (Apache-2.0).
Follows the code: greedy MAP under the kernel `diag(r) cos(V, V) diag(r)` of projected tokens; r is
the mean similarity to the text, scaled to [0, 1] over all crops of an image; crops and frames are
selected on their own.
Differs: the code takes r from CLIP's two towers and negates it; checkpoints in transformers hold no
text tower, hence `relevance="llm"`: cosine to the question's input embeddings, not negated (a
reconstruction; `negate` gives the code's sign). `relevance="none"` is the unconditional DPP. Picks
beyond the kernel's rank go by relevance (the code gets NaN and repeats picks).
Time grows with K N (the width and K): each pick is compared with all tokens.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from vispress.checks import check_choice, check_flag
from vispress.devices import sent
from vispress.methods._parts.geometry.segments import GEOMETRY, Part, keep_by_segment
from vispress.methods._parts.scoring.question import mean_cosine, question, scaled
from vispress.methods.base import Compressor, Evidence
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, TokenPlan, VisualTokens
from vispress_kernels.dpp_select import dpp_select

Relevance = Literal["llm", "none"]


def text_relevance(
    x: Float[Tensor, "B N D"],
    texts: Float[Tensor, "B T D"],
    counted: Tensor,
    *,
    negate: bool,
) -> Float[Tensor, "B N"]:
    """Average the cosine to the texts, scaled to (0, 1] over the counted tokens of each image."""
    similarity = mean_cosine(x, texts)
    return scaled(-similarity if negate else similarity, counted=counted, eps=1e-6)


@final
@register_method("cdpruner")
@dataclass(frozen=True, kw_only=True)
class CDPruner(Compressor):
    """Prune before the LLM, by diversity conditioned on the question.

    Args:
        relevance: `"llm"`: cosine of projected tokens to the question's input embeddings (text
            behind the image; all text where none follows). `"none"`: every token counts alike.
        negate: Turn the similarity around, as the code does with CLIP's.

    Raises:
        ConfigError: A value is out of its range.
    """

    summary: ClassVar[str] = "diverse and close to the question: greedy MAP of a conditional DPP"
    paper: ClassVar[str] = "Zhang et al., NeurIPS 2025, arXiv:2506.10967"
    evidence: ClassVar[Evidence] = "reconstructed"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.TEXT_EMBEDDINGS}

    relevance: Relevance = "llm"
    negate: bool = False

    def validate(self) -> None:
        check_choice("relevance", self.relevance, get_args(Relevance))
        check_flag("negate", self.negate)

    def signals(self) -> frozenset[Signal]:
        return self.reads - ({Signal.TEXT_EMBEDDINGS} if self.relevance == "none" else set())

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        x = tokens.features
        relevance = torch.ones(x.shape[:2], device=x.device)
        if self.relevance == "llm":
            counted = sent(tokens.segments(), x.device) >= 0
            relevance = text_relevance(x, question(tokens), counted, negate=self.negate)

        def pick(part: Part) -> Tensor:
            return dpp_select(part.of(x), part.of(relevance), part.share, backend=tokens.backend)

        return TokenPlan(keep=keep_by_segment(tokens, num_keep, pick))
