"""Relevance DPP's lesson: what the model attends to, from the tokens at the LLM's input."""

from vispress.distillation.distil import Curve, divergence, learn
from vispress.distillation.lessons import Lesson, Pupil
from vispress.distillation.targets import listen


def teach(pupil: Pupil) -> Curve:
    """Listen to the model, then move the method's softmax towards what was heard."""
    advance = pupil.begin("attention", pupil.samples)
    heard = list(listen(pupil.loaded, pupil.prompts, batch_size=pupil.batch_size, advance=advance))
    return learn(pupil, heard, divergence)


LESSONS = (
    Lesson(
        "relevance_dpp", "attention", teach, "divergence from the model's attention", several=True
    ),
)
