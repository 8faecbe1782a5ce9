"""VoCo-LLaMA: let learned tokens behind a picture stand for it, and drop the picture.

Ye et al., CVPR 2025, arXiv:2406.12275
Source: paper; authors' code, github.com/Yxxxb/VoCo-LLaMA, commit 3b6e14d (Apache-2.0), read through
a specification; nothing is copied.
Follows the code: `n` copies of one new word, the VoCo token, stand behind the picture. They see it;
what stands behind them sees them in its place. Training is supervised fine-tuning of the LLM under
that mask, with no loss beside the answer's. Positions count the picture, as in the untouched model.
Differs: the code hides from the rest all that stands in front of the first VoCo token, and
therefore moves the system text behind it: that is `hide="prefix"`. The default, `hide="visual"`
(reconstructed), hides the picture alone, so that a template with text in front of it serves as it
is. Reconstructed as well: several pictures have a run of VoCo tokens each, and each text or later
picture sees of an earlier picture its VoCo tokens alone. The code simulates inference by a mask
that grows with every token; here the picture's keys and values leave the cache of every layer
behind the prefill.
It has no parameters of its own: VoCo tokens are a row of the model's embedding, and what is learned
is the LLM. A model that was not trained so knows nothing of the picture behind them.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from vispress.budget import Budget
from vispress.checks import check_choice, check_integer
from vispress.methods.base import Compressor, Evidence
from vispress.methods.gist_evictor import GistEvictor
from vispress.registry import register_method
from vispress.types import Placement, Positions, Stage, TokenPlan, VisualTokens


@final
@register_method("voco")
@dataclass(frozen=True, kw_only=True)
class VoCo(GistEvictor, Compressor):
    """Let VoCo tokens, which the prompt has behind each image, stand for it; takes no budget.

    How much is kept is how many VoCo tokens the prompt has: the paper has 1 to 128, the released
    code 2. With `hide="prefix"` text leaves the cache, too: what stands in front of the first VoCo
    token.

    Args:
        token_id: The VoCo token's id, which `model.resize_token_embeddings` made room for; None for
            the last word of the model's vocabulary.
        hide: What rows behind an image's VoCo tokens do not see: `"visual"`, the image
            (reconstructed); `"prefix"`, also text in front of the document's first VoCo token
            (the authors' code). A model is used with what it was trained with.

    Raises:
        BudgetError: A budget is given.
        ConfigError: A value is out of range.
    """

    summary: ClassVar[str] = "learned tokens behind each image; the image leaves the cache"
    paper: ClassVar[str] = "Ye et al., CVPR 2025, arXiv:2406.12275"
    takes_budget: ClassVar[bool] = False
    evidence: ClassVar[Evidence] = "read"
    default_positions: ClassVar[Positions] = "original"

    token_id: int | None = None
    hide: str = "visual"

    def validate(self) -> None:
        if self.token_id is not None:
            check_integer("token_id", self.token_id, low=0)
        check_choice("hide", self.hide, ("visual", "prefix"))

    @property
    def gist_token(self) -> int | None:
        """The id that was given."""
        return self.token_id

    @property
    def evicts_prefix(self) -> bool:
        """Whether `hide="prefix"` was given."""
        return self.hide == "prefix"

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.CACHE, budget=Budget(num_tokens=0)),)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        """Keep every token in the prefill."""
        every = torch.arange(tokens.num_visual, device=tokens.features.device)
        return TokenPlan(keep=every.expand(tokens.batch, -1).contiguous())
