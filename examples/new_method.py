"""A method of your own: write `score`, register it, use it by name.

python examples/new_method.py
"""

from dataclasses import dataclass
from typing import ClassVar

from vispress import compress_model, compression_report, register_method
from vispress.methods.base import Evidence, ScorePruner
from vispress.reference import heldout, load
from vispress.types import Placement, Stage


@register_method("norm")
@dataclass(frozen=True, kw_only=True)
class Norm(ScorePruner):
    """Keep the visual tokens with the largest norm."""

    summary: ClassVar[str] = "largest features"
    paper: ClassVar[str] = "an example"
    evidence: ClassVar[Evidence] = "control"

    def placements(self, num_layers):
        return (Placement(stage=Stage.PRE_LLM, budget=self.budget(num_layers)),)

    def score(self, tokens):
        return tokens.features.float().norm(dim=-1)


model, processor = load()
image, prompt, answer, _ = heldout("reading", 1)[0]
inputs = processor(images=[image], text=[prompt], return_tensors="pt")
compress_model(model, "norm", keep_ratio=0.5)
out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
print(prompt, processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(f"right answer: {answer}\n{compression_report(model)}")
