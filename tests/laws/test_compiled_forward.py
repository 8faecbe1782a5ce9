"""A model whose whole forward is compiled: choices are made between graphs, layers are traced."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.laws.selection import cases
from tests.laws.table import GISTS, VIDEO_ONLY, VIDEO_SAMPLES, make
from tests.tiny import Image, Sample, Text, build, gist_tokens, make_inputs
from torch._dynamo.utils import counters

from vispress import compressed, compression_report
from vispress.errors import UnsupportedModelError

SAMPLES = [Sample([Text(5), Image(4, 4), Text(7)])]
CHOICES = "vispress finds pictures and chooses tokens on the host"
"""What torch says of every break that compression makes."""
ITS_OWN = "Tensor.item()", "aten._local_scalar_dense"
"""Of breaks that the untouched model has, too."""


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=100, accumulated_recompile_limit=1000):
        yield
    torch._dynamo.reset()


def inputs_of(family: str, method: str) -> dict[str, Any]:
    samples = VIDEO_SAMPLES[:1] if method in VIDEO_ONLY else SAMPLES
    return make_inputs(family, samples, dtype=torch.float32)


@pytest.mark.slow(cases=0)
@pytest.mark.parametrize(("family", "method"), cases("compiled forward"))
def test_a_compiled_forward_gives_the_same(family: str, method: str) -> None:
    model = build(family, dtype=torch.float32)
    with (
        torch.no_grad(),
        compressed(model, make(family, method)),
        gist_tokens(int(method in GISTS)),
    ):
        inputs = inputs_of(family, method)
        logits, kept = model(**inputs).logits, str(compression_report(model).samples)
        forward = torch.compile(model.forward, backend="eager")
        assert torch.equal(forward(**inputs).logits, logits)
        assert str(compression_report(model).samples) == kept
        first = counters["stats"]["unique_graphs"]
        assert torch.equal(forward(**inputs).logits, logits)
    assert counters["stats"]["unique_graphs"] == first  # nothing is traced anew


@pytest.mark.slow
@pytest.mark.parametrize("method", ["visionzip", pytest.param("fastv", marks=pytest.mark.full)])
def test_graphs_end_for_choices_alone_and_layers_are_whole(method: str) -> None:
    model, inputs = build("llava", dtype=torch.float32), inputs_of("llava", method)
    with torch.no_grad(), compressed(model, make("llava", method)):
        logits, kept = model(**inputs).logits, str(compression_report(model).samples)
        assert torch.equal(torch.compile(model.forward, backend="eager")(**inputs).logits, logits)
        assert str(compression_report(model).samples) == kept
    assert counters["stats"]["unique_graphs"] > len(model.model.language_model.layers)
    reasons = [r for r in counters["graph_break"] if not any(own in r for own in ITS_OWN)]
    assert reasons
    assert all(CHOICES in reason for reason in reasons)


@pytest.mark.full
@pytest.mark.parametrize("method", ["divprune", "visionzip", "pyramiddrop"])
@pytest.mark.parametrize("whole", [False, True], ids=["layers", "forward"])
def test_inductor_keeps_the_same_tokens(method: str, whole: bool) -> None:
    model = build("llava", dtype=torch.float32)
    inputs = inputs_of("llava", method)
    with torch.no_grad(), compressed(model, make("llava", method)):
        logits, kept = model(**inputs).logits, str(compression_report(model).samples)
        forward = model
        if whole:
            forward = torch.compile(model.forward)
        else:
            for layer in model.model.language_model.layers:
                layer.compile()
        torch.testing.assert_close(forward(**inputs).logits, logits, atol=1e-4, rtol=1e-4)
        assert str(compression_report(model).samples) == kept


@pytest.mark.slow(cases=0)
def test_generate_runs_a_compiled_forward() -> None:
    model = build("llava", dtype=torch.float32)
    inputs, options = inputs_of("llava", "fastv"), {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), compressed(model, make("llava", "fastv")):
        ids = model.generate(**inputs, **options)
        model.forward = torch.compile(model.forward, backend="eager")
        assert torch.equal(model.generate(**inputs, **options), ids)
        del model.forward


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("pictures", [False, True])
def test_an_export_is_refused_with_what_works(strict: bool, pictures: bool) -> None:
    """torch wraps what is raised while it traces, and shows its text."""
    model, inputs = build("llava", dtype=torch.float32), inputs_of("llava", "divprune")
    inputs = inputs if pictures else {"input_ids": inputs["input_ids"][:, -5:]}
    refusal = pytest.raises(
        RuntimeError if strict else UnsupportedModelError,
        match=r"remove_compression\(model\) before torch.export",
    )
    with torch.no_grad(), compressed(model, make("llava", "divprune")), refusal:
        torch.export.export(model, (), {**inputs, "use_cache": False}, strict=strict)


@pytest.mark.parametrize("pictures", [False, True])
def test_a_jit_trace_is_refused_with_what_works(pictures: bool) -> None:
    model, inputs = build("llava", dtype=torch.float32), inputs_of("llava", "divprune")
    inputs = inputs if pictures else {"input_ids": inputs["input_ids"][:, -5:]}
    refusal = pytest.raises(UnsupportedModelError, match=r"torch.jit.trace .* remove_compression")
    with torch.no_grad(), compressed(model, make("llava", "divprune")), refusal:
        torch.jit.trace(model, example_kwarg_inputs={**inputs}, check_trace=False, strict=False)


def test_one_graph_of_all_is_refused_with_what_works() -> None:
    model = build("llava", dtype=torch.float32)
    with torch.no_grad(), compressed(model, make("llava", "divprune")):
        forward = torch.compile(model.forward, backend="eager", fullgraph=True)
        with pytest.raises(RuntimeError, match=r"compile with fullgraph=False.*layer.compile\(\)"):
            forward(**inputs_of("llava", "divprune"))
