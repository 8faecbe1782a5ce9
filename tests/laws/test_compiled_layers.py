"""Decoder layers that are compiled one by one, as regional compilation does."""

from typing import Any

import pytest
import torch
from tests.laws.table import make
from tests.tiny import Image, Sample, Text, build, make_inputs
from torch._dynamo.utils import counters

from vispress import compressed

CHOOSING = "torch.compiler.disable"
"""The one reason to leave a graph: between layers rows are chosen, on the host."""
METHODS = ("divprune", "fastv", "cmai", "pyramiddrop", "transprune")
HANDED = ("yopo", "transprune")
"""Methods that hand a call from a layer's attention to its MLP: its context breaks graphs, too."""
OTHERS = [pytest.param(name, marks=pytest.mark.full) for name in METHODS]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["yopo", *OTHERS])
def test_compiled_layers_give_the_same_and_are_one_graph_each(method: str) -> None:
    model = build("llava", dtype=torch.float32, layers=4)
    inputs = make_inputs("llava", [Sample([Text(5), Image(4, 4), Text(7)])], dtype=torch.float32)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    torch._dynamo.reset()
    with (
        torch.no_grad(),
        compressed(model, make("llava", method)),
        torch._dynamo.config.patch(recompile_limit=100, accumulated_recompile_limit=1000),
    ):
        logits, ids = model(**inputs).logits, model.generate(**inputs, **options)
        for layer in model.model.language_model.layers:
            layer.compile(backend="eager")
        counters.clear()
        assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(model.generate(**inputs, **options), ids)
    assert counters["stats"]["unique_graphs"] >= len(model.model.language_model.layers)
    assert method in HANDED or all(CHOOSING in reason for reason in counters["graph_break"])
