"""Train relevance DPP's network further, by the loss of answers instead of attention.

    python -m benchmarks.relevance_answers --out answered [--start-from FOLDER]

Its scores become a soft mask of the highest 16 tokens, as CoViPAL's do (temperatures 0.1 to 0.02 of
standardised scores); what comes out is a compressor of `relevance_dpp`. By default it starts from
the shipped parameters, which attention has taught. About four minutes on one core.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from benchmarks.halved import module_of
from vispress.kinds import Evidence, Softens
from vispress.methods import RelevanceDPP
from vispress.methods._parts.scoring.question import question
from vispress.methods._parts.scoring.soft_choice import past_threshold, standardised
from vispress.methods.base import Compressor, top_indices
from vispress.types import ModuleShape, Placement, Signal, Stage, TokenPlan, VisualTokens

COOLED = 0.2
"""Temperature at the end, as a share of the one at the beginning."""


@dataclass(frozen=True, kw_only=True)
class SoftRelevance(Compressor):
    """Keep the highest scores of relevance DPP's network; in training by a soft mask.

    Args:
        temperature: Of the mask.
    """

    name: ClassVar[str] = "soft_relevance"
    summary: ClassVar[str] = "the highest scores of relevance DPP's network"
    paper: ClassVar[str] = "own"
    evidence: ClassVar[Evidence] = "own"
    reads: ClassVar[frozenset[Signal]] = RelevanceDPP.reads
    trained: ClassVar[bool] = True
    softens: ClassVar[Softens | None] = "keys"

    temperature: float = 0.1

    def at(self, progress: float) -> "SoftRelevance":
        """The temperature falls by the same factor with every step."""
        return replace(self, temperature=self.temperature * COOLED**progress)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def make_module(self, shape: ModuleShape) -> nn.Module:
        return RelevanceDPP().make_module(shape)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.module is not None  # `trained`
        score = tokens.module(tokens.features, question(tokens))
        keep = top_indices(score.detach(), num_keep)
        if not tokens.training:
            return TokenPlan(keep=keep)
        soft = past_threshold(standardised(score), num_keep, self.temperature)
        return TokenPlan(keep=keep, soft=soft.clamp(min=torch.finfo(soft.dtype).tiny))


def main(words: Sequence[str] | None = None) -> None:
    """Train, and write the compressor with its curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start-from", type=Path, help="a folder; the shipped one by default")
    parser.add_argument("--samples", type=int, default=2400)
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=24)
    args = parser.parse_args(words)
    from vispress import compress_model, remove_compression, save_compression
    from vispress.bench.model.loaded_model import load_named_model
    from vispress.distillation.answers import teach
    from vispress.distillation.lessons import Pupil
    from vispress.distillation.scenes import training_prompts
    from vispress.reference import compressor

    loaded = load_named_model("reference", "cpu", "fp32")
    begun = args.start_from or compressor()
    compress_model(loaded.model, config=begun)
    tensors = {k: v.clone() for k, v in module_of(loaded.model).state_dict().items()}
    remove_compression(loaded.model)

    class Started(Pupil):
        """Begins with other parameters than a folder of its own method's."""

        def compress(self) -> nn.Module:
            module = super().compress()
            module_of(loaded.model).load_state_dict(tensors)
            return module

    sizes = {"steps": args.steps, "batch_size": args.batch_size}
    shown = training_prompts(args.samples)
    curve = teach(Started(loaded, SoftRelevance(num_tokens=16), shown, lr=5e-4, **sizes))
    tensors = {k: v.clone() for k, v in module_of(loaded.model).state_dict().items()}
    remove_compression(loaded.model)
    compress_model(loaded.model, config=begun)
    module_of(loaded.model).load_state_dict(tensors)
    told = {"stage": "answers", "samples": args.samples, **sizes}
    save_compression(loaded.model, args.out, data=told)
    losses = {"loss": [round(loss, 5) for loss in curve.loss], "held_out": curve.held_out}
    (args.out / "curve.json").write_text(json.dumps(losses) + "\n", encoding="utf-8")
    print(f"loss of answers: {curve.held_out[0]:.3f} before, {curve.held_out[1]:.3f} behind")


if __name__ == "__main__":
    main()
