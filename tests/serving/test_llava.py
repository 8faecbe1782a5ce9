"""LLaVA-1.5 in vLLM keeps and answers what vispress keeps and answers on transformers."""

import pytest
import torch

import vispress
from tests.serving.harness import check, engine, on_transformers
from tests.serving.samples import scenes
from tests.tiny_models import build
from vispress.adapters.base import find_adapter
from vispress.config import make_compressor
from vispress.integrations.vllm.spec import servable

METHODS = servable(find_adapter(build("llava", layers=2)))


@pytest.fixture(scope="module")
def asks(llava, tmp_path_factory):
    """What `hf_overrides` say for a method; trained ones have random parameters in a folder."""
    _, model, _ = llava

    def asked(name: str) -> dict:
        if not make_compressor(name, num_tokens=18).trained:
            return {"method": name, "num_tokens": 18}
        folder = tmp_path_factory.mktemp(name)
        generator = torch.Generator().manual_seed(0)
        vispress.compress_model(model, name, num_tokens=18, positions="compact")
        with torch.no_grad():
            for parameter in model.model.vispress_modules.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        vispress.save_compression(model, folder)
        vispress.remove_compression(model)
        return {"config": str(folder)}

    return asked


@pytest.mark.parametrize("method", METHODS)
def test_as_on_transformers(llava, asks, method):
    folder, model, processor = llava
    asked, prompts = asks(method), scenes(processor)
    expected = on_transformers(model, processor, prompts, asked)
    with engine(folder, processor, asked) as made:
        check(made, prompts, expected)
