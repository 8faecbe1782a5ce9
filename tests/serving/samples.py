"""Prompts about held-out scenes of the reference models."""

from tests.serving.harness import Prompt
from vispress.reference.evaluation.evaluate import held_out
from vispress.reference.processor import with_marks

KINDS = ("attribute", "needle", "reading", "where")


def scenes(processor, each: int = 2) -> list[Prompt]:
    """One picture and a question, two and five pictures, text alone; no picture twice."""
    found = [held_out(kind, each + 2, seed=ord(kind[0])) for kind in KINDS]
    singles = [one for kind in found for one in kind[:each]]
    spare = [one.image for kind in found for one in kind[each:]]
    question = "which picture has a red circle ? :"
    five = "<image> the <image> <image> is <image> <image>"
    prompts = [
        *(Prompt(one.question.prompt, (one.image,)) for one in singles),
        Prompt(f"<image> <image> {question}", tuple(spare[:2])),
        Prompt(f"{five} {question}", tuple(spare[2:7])),
        Prompt("is there a red circle ? :"),
    ]
    return [Prompt(with_marks(processor, one.text), one.images) for one in prompts]
