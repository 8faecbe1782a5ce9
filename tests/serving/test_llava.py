"""LLaVA-1.5 in vLLM keeps and answers what vispress keeps and answers on transformers."""

import pytest

from tests.serving.harness import check, engine, on_transformers
from tests.serving.samples import scenes


@pytest.mark.parametrize("method", ["divprune", "random"])
def test_as_on_transformers(llava, method):
    folder, model, processor = llava
    asked = {"method": method, "num_tokens": 18}
    prompts = scenes(processor)
    expected = on_transformers(model, processor, prompts, asked)
    with engine(folder, processor, asked) as made:
        check(made, prompts, expected)
