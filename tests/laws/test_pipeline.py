"""`pipeline("image-text-to-text")` on a compressed model, with the reference model's processor."""

import pytest
import torch
from transformers import pipeline

from vispress import compress_model, compression_report, remove_compression
from vispress.reference import heldout, load

pytestmark = pytest.mark.slow


def test_a_pipeline_answers_on_the_compressed_model() -> None:
    model, processor = load()
    pipe = pipeline(
        "image-text-to-text",
        model=model,
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        processor=processor,
    )
    image, prompt, _, _ = heldout("attribute", 1)[0]
    plain = pipe(images=image, text=prompt, max_new_tokens=2, return_full_text=False)
    compress_model(pipe.model, "fastervlm", num_tokens=36)
    small = pipe(images=image, text=prompt, max_new_tokens=2, return_full_text=False)
    report = compression_report(pipe.model)
    assert (report.samples[0].images[0].num_visual, report.samples[0].images[0].num_kept) == (
        144,
        36,
    )
    assert isinstance(small[0]["generated_text"], str)
    remove_compression(pipe.model)
    again = pipe(images=image, text=prompt, max_new_tokens=2, return_full_text=False)
    assert again == plain


def test_the_pipeline_itself_is_refused_with_a_hint() -> None:
    model, _ = load()

    class Pipeline:
        def __init__(self) -> None:
            self.model = model

    with pytest.raises(TypeError, match=r"pass its \.model"):
        compress_model(Pipeline(), "divprune", keep_ratio=0.5)  # type: ignore[type-var]
    assert torch.is_tensor(next(model.parameters()))
