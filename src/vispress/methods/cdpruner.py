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
`variant="openvino"` is the version of OpenVINO GenAI (openvinotoolkit/openvino.genai at da1db86,
Apache-2.0): the text is one vector, the mean embedding of the whole prompt; the kernel is the blend
`(1 - w) cos(V, V) + w diag(r) cos(V, V) diag(r)`; the tokens of a crop or frame are selected in two
halves, each scaled on its own. It differs by positions, which are the runtime's, by counts, of
which halves go to the even number, and by picks beyond the rank (the code's go by place).
Time grows with K N (the width and K): each pick is compared with all tokens.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vispress.checks import check_choice, check_flag, check_number
from vispress.devices import sent
from vispress.errors import ConfigError
from vispress.methods._parts.geometry.segments import GEOMETRY, Part, keep_by_segment
from vispress.methods._parts.scoring.cosines import unit
from vispress.methods._parts.scoring.question import mean_cosine, question, scaled
from vispress.methods.base import Compressor, Evidence, upcast
from vispress.registry import register_method
from vispress.types import Placement, Signal, Stage, TokenPlan, VisualTokens
from vispress_kernels import Backend
from vispress_kernels.dpp_select import dpp_select

Relevance = Literal["llm", "none"]

Variant = Literal["authors", "openvino"]
PUBLISHED_WEIGHT = 0.5
"""Of relevance against diversity alone, in OpenVINO's variant."""


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


def blended(
    x: Float[Tensor, "b n D"], similarity: Float[Tensor, "b n"], weight: float
) -> Float[Tensor, "b n E"]:
    """Make vectors whose products are `(1 - w) cos + w r cos r`, with r scaled to [0, 1).

    They are the tokens themselves and, beside it, times r.
    """
    low, high = similarity.aminmax(dim=1, keepdim=True)
    r = (similarity - low) / (high - low + 1e-6)
    u = unit(x)
    return torch.cat([(1 - weight) ** 0.5 * u, weight**0.5 * r[..., None] * u], dim=2)


def blended_select(
    x: Float[Tensor, "b n D"],
    similarity: Float[Tensor, "b n"],
    weight: float,
    num_keep: int,
    backend: Backend = "auto",
) -> Int[Tensor, "b K"]:
    """Choose by the blend of a DPP with and without relevance, in the order taken."""
    vectors = blended(x, similarity, weight)
    size: Tensor = torch.linalg.vector_norm(vectors, dim=2)
    return dpp_select(vectors, size, num_keep, backend=backend)


@final
@register_method("cdpruner")
@dataclass(frozen=True, kw_only=True)
class CDPruner(Compressor):
    """Prune before the LLM, by diversity conditioned on the question.

    Args:
        relevance: `"llm"`: cosine of projected tokens to the question's input embeddings (text
            behind the image; all text where none follows). `"none"`: every token counts alike.
        negate: Turn the similarity around, as the code does with CLIP's.
        variant: `"authors"`, or `"openvino"`, which blends and selects in halves.
        relevance_weight: w of that variant, in `[0, 1]`; None for 0.5.

    Raises:
        ConfigError: A value is out of its range.
    """

    summary: ClassVar[str] = "diverse and close to the question: greedy MAP of a conditional DPP"
    paper: ClassVar[str] = "Zhang et al., NeurIPS 2025, arXiv:2506.10967"
    evidence: ClassVar[Evidence] = "reconstructed"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY | {Signal.TEXT_EMBEDDINGS}

    relevance: Relevance = "llm"
    negate: bool = False
    variant: Variant = "authors"
    relevance_weight: float | None = None

    def validate(self) -> None:
        check_choice("relevance", self.relevance, get_args(Relevance))
        check_flag("negate", self.negate)
        check_choice("variant", self.variant, get_args(Variant))
        if self.relevance_weight is None:
            return
        check_number("relevance_weight", self.relevance_weight, low=0.0, high=1.0)
        if self.variant != "openvino":
            raise ConfigError(
                f"relevance_weight={self.relevance_weight!r} blends in variant='openvino' alone; "
                f"leave it out with variant={self.variant!r}"
            )

    def signals(self) -> frozenset[Signal]:
        return self.reads - ({Signal.TEXT_EMBEDDINGS} if self.relevance == "none" else set())

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        if self.variant == "openvino":
            return TokenPlan(keep=self.in_halves(tokens, num_keep))
        x = tokens.features
        relevance = torch.ones(x.shape[:2], device=x.device)
        if self.relevance == "llm":
            counted = sent(tokens.segments(), x.device) >= 0
            relevance = text_relevance(x, question(tokens), counted, negate=self.negate)

        def pick(part: Part) -> Tensor:
            return dpp_select(part.of(x), part.of(relevance), part.share, backend=tokens.backend)

        return TokenPlan(keep=keep_by_segment(tokens, num_keep, pick))

    def in_halves(self, tokens: VisualTokens, num_keep: int) -> Int[Tensor, "B K"]:
        """Keep what OpenVINO's variant does."""
        x, similarity = tokens.features, torch.zeros(tokens.index.shape, device=tokens.index.device)
        weight = PUBLISHED_WEIGHT if self.relevance_weight is None else self.relevance_weight
        if self.relevance == "none":
            weight = 0.0
        else:
            texts = tokens.text_embeddings
            assert texts is not None  # declared in `signals`
            mean = upcast(texts).sum(dim=1, keepdim=True) / max(1, texts.shape[1])
            similarity = mean_cosine(x, mean)
            similarity = -similarity if self.negate else similarity

        def pick(part: Part) -> Tensor:
            own, score, half = part.of(x), part.of(similarity), part.places.shape[-1] // 2
            first = part.share // 2
            parts = ((slice(half), first), (slice(half, None), part.share - first))
            chosen = [
                blended_select(own[:, at], score[:, at], weight, count, tokens.backend)
                for at, count in parts
                if count
            ]
            chosen[-1] = chosen[-1] + half
            return torch.cat(chosen, dim=1)

        return keep_by_segment(tokens, num_keep, pick)
