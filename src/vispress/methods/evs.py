"""EVS: of a video, keep the tokens that changed most since the frame before.

Bagrov et al., "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM
Inference", 2025, arXiv:2510.14624.
Source: https://github.com/vllm-project/vllm at 926c71f (Apache-2.0, with a notice of NVIDIA).
Follows the code: dissimilarity is one minus the cosine to the same place of the frame before, the
first frame stands above all; the highest are kept over the whole video, ties keep the earlier;
counts are truncated; positions stay those of the full video.
Differs: a budget below one frame is met exactly, by the first frame's first tokens (the code keeps
the whole first frame); newline tokens are kept within the budget. Images pass whole.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vispress.budget import Rounding
from vispress.methods._parts.geometry.segments import GEOMETRY
from vispress.methods._parts.video.frames import check_whole
from vispress.methods.base import Evidence, ScorePruner, upcast
from vispress.registry import register_method
from vispress.types import Need, Placement, Positions, Signal, Stage, VisualTokens

FIRST_FRAME = 255.0
NEWLINE = 256.0


def dissimilarity(x: Float[Tensor, "B N D"], frame: int) -> Float[Tensor, "B N"]:
    """Subtract from 1 the cosine to the token `frame` places before; the first frame: 255."""
    cosine = F.cosine_similarity(x[:, frame:], x[:, :-frame], dim=-1)
    return torch.cat([torch.full_like(x[:, :frame, 0], FIRST_FRAME), 1 - cosine], dim=1)


@final
@register_method("evs")
@dataclass(frozen=True, kw_only=True)
class EVS(ScorePruner):
    """Prune videos before the LLM, by change from frame to frame; the question plays no part."""

    summary: ClassVar[str] = "of videos: most changed since the frame before"
    paper: ClassVar[str] = "Bagrov et al. 2025, arXiv:2510.14624"
    evidence: ClassVar[Evidence] = "code"
    reads: ClassVar[frozenset[Signal]] = GEOMETRY
    whole: ClassVar[bool] = True
    needs: ClassVar[Need | None] = "video"
    rounding: ClassVar[Rounding] = "floor"
    default_positions: ClassVar[Positions] = "original"

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def score(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Measure each token's change since the frame before; newlines stand above the first frame.

        Raises:
            UnsupportedMethodError: The video was pruned before.
        """
        check_whole(tokens, self.name)
        places = tokens.segments()[0]
        visual, frame = int((places >= 0).sum()), int((places == 0).sum())
        x = upcast(tokens.features)
        # newlines stand behind the last frame
        newlines = torch.full_like(x[:, visual:, 0], NEWLINE)
        return torch.cat([dissimilarity(x[:, :visual], frame), newlines], dim=1)
