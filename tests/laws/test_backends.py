"""`backend` reaches every kernel a method can use, and does not change what is kept."""

import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tests.kernels.interpreter import multiply_alike_everywhere, replace_once_a_launch
from tests.laws import cases

import vispress_kernels
from vispress import compress_model, compression_report, remove_compression
from vispress_kernels import _launch, has_triton

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="needs triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="benchmarks/gpu/laws.py does it there"),
]

# what a method launches beside the gathers of the runtime
OWN = {
    "cdpruner": {"dpp_kernel"},
    "divprune": {"assign_nearest_kernel", "maxmin_held_kernel"},
    "fastervlm": {"logits_kernel"},
    "fastv": {"logits_kernel"},
    "fourier": {"dct_lowpass_kernel"},
    "pyramiddrop": {"logits_kernel"},
    "tome": {"assign_nearest_kernel", "merge_tokens_kernel"},
    "transprune": {"logits_kernel", "transition_scores_kernel"},
    "visionzip": {"assign_nearest_kernel", "logits_kernel", "merge_tokens_kernel"},
    "vtc_cls": {"logits_kernel"},
    "zoo_prune": {"maxmin_held_kernel", "perturbation_scores_kernel"},
}


def few() -> list[str]:
    """Methods that launch every kernel of `OWN` between them: interpreted, each takes seconds."""
    chosen: list[str] = []
    left = set().union(*OWN.values())
    while left:
        chosen.append(max(OWN, key=lambda method: len(OWN[method] & left)))
        left -= OWN[chosen[-1]]
    return chosen


METHODS = [
    pytest.param(method, marks=() if method in few() else pytest.mark.full)
    for method in cases.DROPS
    if cases.fits("llava", method)
]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each kernel was launched."""
    replace_once_a_launch(monkeypatch)
    multiply_alike_everywhere(monkeypatch)
    seen: Counter[str] = Counter()
    original = _launch.launch

    def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        seen[kernel.fn.__name__] += 1
        original(kernel, programs, *args, **options)

    with ExitStack() as stack:
        for op in pkgutil.iter_modules(vispress_kernels.__path__):
            if op.ispkg:
                module = importlib.import_module(f"vispress_kernels.{op.name}.kernel")
                stack.enter_context(patch.object(module, "launch", launch))
        yield seen


def run(family: str, method: str, backend: str, **more: Any) -> tuple[Any, torch.Tensor]:
    model = cases.model_of(family, torch.float32)
    inputs = cases.inputs_of(family, "left", torch.float32)
    compress_model(model, method, backend=backend, **cases.settings(family, method, **more))  # type: ignore[arg-type]
    try:
        logits = cases.logits_of(model, inputs)
        return compression_report(model), logits
    finally:
        remove_compression(model)


def compare(family: str, method: str, launched: Counter[str], **more: Any) -> None:
    report, logits = run(family, method, "triton", **more)
    kernels = set(launched)
    launched.clear()
    plain, expected = run(family, method, "torch", **more)
    assert not launched
    for layer in range(report.num_layers):
        assert torch.equal(report.alive(layer), plain.alive(layer))
    real = cases.inputs_of(family, "left", torch.float32)["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-3)
    wanted = OWN.get(method, set())
    if more.get("scores") == "column_mean":
        wanted = wanted - {"logits_kernel"} | {"row_stats_kernel", "column_mean_kernel"}
    assert wanted <= kernels
    assert "gather_tokens_kernel" in kernels


@pytest.mark.slow(cases=len(OWN))
@pytest.mark.parametrize("method", METHODS)
def test_both_backends_keep_the_same(method: str, launched: Counter[str]) -> None:
    compare("llava", method, launched, **({"m": 4} if method == "zoo_prune" else {}))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_substitute_for_cls_attention_reads_columns(
    family: str, launched: Counter[str]
) -> None:
    compare(family, "fastervlm", launched, scores="column_mean")


@pytest.mark.slow
def test_gradients_flow_with_triton(launched: Counter[str]) -> None:
    model = cases.model_of("llava", torch.float32)
    inputs = cases.inputs_of("llava", "left", torch.float32)
    grads = []
    for backend in ("triton", "torch"):
        compress_model(model, "fourier", backend=backend, keep_ratio=0.4)  # type: ignore[arg-type]
        try:
            model.zero_grad()
            model(**inputs).logits.square().mean().backward()
            grads.append(model.model.multi_modal_projector.linear_1.weight.grad.clone())
        finally:
            remove_compression(model)
            model.zero_grad()
    assert launched["dct_lowpass_kernel"]
    torch.testing.assert_close(*grads)
