"""CUDA graphs give what uncaptured models give; the tape stands for them where there is no GPU."""

from typing import Any

import pytest
import torch
from tests.laws.cases import GISTS, SAMPLES, cases, make
from tests.tiny import build, gist_tokens, make_inputs
from torch import Tensor

from vispress import capture, compress_model, compressed, compression_report, remove_compression

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TIGHT = {"rtol": 1e-4, "atol": 1e-4}


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: one.to("cuda") for name, one in inputs.items()}


def batches(family: str, gists: int) -> list[dict[str, Any]]:
    with gist_tokens(gists):
        made = [
            make_inputs(family, SAMPLES, padding="left", seed=seed, dtype=torch.float32)
            for seed in (0, 7)
        ]
    return [on_gpu(inputs) for inputs in made]


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**inputs).logits
    return found


def answer(model: Any, inputs: dict[str, Any]) -> Tensor:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found: Tensor = model.generate(**inputs, **options)
    return found


@pytest.mark.parametrize(("family", "method"), cases("captured on gpu", every_method=True))
def test_graphs_give_what_uncaptured_models_give(family: str, method: str) -> None:
    model = build(family, dtype=torch.float32).to("cuda")
    inputs, compressor = batches(family, int(method in GISTS)), make(family, method)
    with compressed(model, compressor):
        expected = [(logits(model, one), answer(model, one)) for one in inputs]
        kept = []
        for one in inputs:
            logits(model, one)
            kept.append(compression_report(model).samples)
        with capture(model) as captured:
            for one, (wanted, ids), samples in zip(inputs * 2, expected * 2, kept * 2, strict=True):
                assert torch.allclose(logits(model, one), wanted, **TIGHT)
                assert compression_report(model).samples == samples
                assert torch.equal(answer(model, one), ids)
            if compressor.uncapturable() is None:
                assert captured.report().prefills == 8, str(captured.report())


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_untouched_models_are_captured_too(family: str) -> None:
    model = build(family, dtype=torch.float32).to("cuda")
    inputs = batches(family, 0)
    expected = [(logits(model, one), answer(model, one)) for one in inputs]
    with capture(model) as captured:
        for one, (wanted, ids) in zip(inputs * 2, expected * 2, strict=True):
            assert torch.allclose(logits(model, one), wanted, **TIGHT)
            assert torch.equal(answer(model, one), ids)
        assert captured.report().prefills == 8, str(captured.report())
        assert captured.report().steps == 20, str(captured.report())


def test_streams_take_turns() -> None:
    model = build("llava", dtype=torch.float32).to("cuda")
    compress_model(model, "fastv", keep_ratio=0.5)
    inputs = batches("llava", 0)
    expected = [logits(model, one) for one in inputs]
    with capture(model):
        found = []
        for number in range(8):
            stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(logits(model, inputs[number % 2]))
        torch.cuda.synchronize()
        for number, one in enumerate(found):
            assert torch.allclose(one, expected[number % 2], **TIGHT)
    remove_compression(model)
