"""A compiled decode step on a static cache is traced as often as that of the untouched model."""

from typing import Any

import pytest
import torch
from tests.laws.cases import settings
from tests.tiny import Image, Part, Sample, Text, Video, build, make_inputs
from transformers import CompileConfig, StaticCache

from vispress import compress_model, remove_compression
from vispress.runtime.kv_cache.hf_compat import cache_of

GRAPHS: list[int] = []


def count_graphs(module: Any, example_inputs: Any) -> Any:
    """A torch.compile backend that only counts (a function: generation configs get deep-copied)."""
    GRAPHS.append(len(example_inputs))
    return module.forward


def prompt(family: str, number: int, video: bool) -> dict[str, Any]:
    """One to three images (or videos), another length each time."""
    parts: list[Part] = [Text(3 + number)]
    for i in range(1 + number % 3):
        parts += [Video(3) if video else Image(), Text(2 + i)]
    return make_inputs(family, [Sample(parts)], seed=number, dtype=torch.float32)


def compiled_graphs(model: Any, family: str, video: bool) -> list[int]:
    """Graphs made after each of four prompts; tokens must equal those of a dynamic cache."""
    torch._dynamo.reset()
    model.__dict__.pop("_compiled_call", None)
    GRAPHS.clear()
    config = CompileConfig(backend=count_graphs, fullgraph=False, dynamic=None, mode=None)
    made = []
    for number in range(4):
        inputs = prompt(family, number, video)
        greedy: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        expected = model.generate(**inputs, **greedy)
        got = model.generate(
            **inputs, **greedy, cache_implementation="static", compile_config=config
        )
        assert torch.equal(got, expected)
        made.append(len(GRAPHS))
    return made


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llava", "fastv"),
        ("llava", "divprune"),
        ("qwen2_5_vl", "fastv"),
        ("llava", "pmod"),
        ("llava", "yopo"),
        ("llava_onevision", "dycoke"),
    ],
)
def test_no_recompiles_after_the_second_prompt(family: str, method: str) -> None:
    model = build(family, dtype=torch.float32, layers=4)
    # transformers compiles by itself on accelerators only

    def compiles(kwargs: dict[str, Any], config: Any) -> bool:
        return type(cache_of(kwargs)) is StaticCache

    model._valid_auto_compile_criteria = compiles
    plain = compiled_graphs(model, family, method == "dycoke")
    compress_model(model, method, **settings(family, method))
    try:
        compressed = compiled_graphs(model, family, method == "dycoke")
    finally:
        remove_compression(model)
    assert plain[0] >= 1, "nothing was compiled"
    assert compressed == plain
    assert compressed[1] == compressed[-1]
