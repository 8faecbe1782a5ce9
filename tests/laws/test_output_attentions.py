"""`output_attentions=True` gives maps in logical places: those of the masked model, with zeros in
rows and columns of tokens that did not enter a layer.
"""

from typing import Any

import pytest
import torch
from tests.laws.cases import (
    DROPPING,
    Spy,
    cases,
    changed_rows,
    encoding_as,
    inputs_of,
    make,
    model_of,
    noting,
)
from tests.laws.oracle import extend, generate_positions, oracle_attentions
from tests.tiny import Image, Sample, Text, make_inputs
from torch import Tensor

from vispress import compressed
from vispress.adapters.base import find_adapter

METHODS = ("divprune", "fastv", "pyramiddrop", "lvlm_csp", "no_image", "scm", "avg_pool")
"""What is kept before and in the LLM, in spans of layers, behind a probe, nothing, other values."""
CLOSE = 1e-4
"""Of numbers in [0, 1], fp32 (plain transformers gives NaN for padding in eager fp64)."""


def assert_close(found: Any, expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape
        assert (got - want).abs().max() < CLOSE


@pytest.mark.parametrize(
    ("family", "method", "cached"),
    cases("attentions", [c for c in DROPPING if c[1] in METHODS], turning=(True, False)),
)
def test_maps_are_those_of_the_masked_model(family: str, method: str, cached: bool) -> None:
    model = model_of(family, torch.float32, "eager")
    inputs, compressor, spy = inputs_of(family, dtype=torch.float32), make(family, method), Spy()
    with compressed(model, spy.watch(compressor)) as report, torch.no_grad():
        with noting(model, [compressor]) as encoded:
            out = model(**inputs, output_attentions=True, use_cache=cached)
        alive = [report.alive(layer) for layer in range(report.num_layers)]
        values = changed_rows(report.report, spy, inputs["input_ids"].shape)
    positions: Any = "original" if find_adapter(model).mrope else compressor.default_positions
    with torch.no_grad(), encoding_as(model, encoded):
        expected = oracle_attentions(model, inputs, alive, positions, values)
    found = [
        # layers that all tokens enter hold what the model has for rows of padding
        each * live[:, None, :, None]
        for each, live in zip(out.attentions, alive, strict=True)
    ]
    assert_close(found, expected)
    for each, live in zip(out.attentions, alive, strict=True):
        dropped = inputs["attention_mask"].bool() & ~live
        assert not each.transpose(1, 2)[dropped].any()
        assert not each.permute(0, 3, 1, 2)[dropped].any()


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_maps_of_decode_steps_are_those_of_the_masked_model(family: str, cache: str) -> None:
    model = model_of(family, torch.float32, "eager")
    inputs = inputs_of(family, dtype=torch.float32)
    options: dict[str, Any] = {"use_cache": False} if cache == "none" else {}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    steps = 3
    chain = [make(family, "divprune"), make(family, "fastv")]
    with compressed(model, chain, positions="original") as report:
        out = model.generate(
            **inputs, **options, max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
            output_attentions=True, return_dict_in_generate=True,
        )  # fmt: skip
        prompt = inputs["input_ids"].shape[1]
        alive = [
            extend(report.alive(layer)[:, :prompt], steps - 1, fill=True)
            for layer in range(report.num_layers)
        ]
    new = torch.ones_like(out.sequences[:, prompt:-1])
    grown = inputs | {
        "input_ids": out.sequences[:, :-1],
        "attention_mask": torch.cat([inputs["attention_mask"], new], dim=1),
    }
    if "mm_token_type_ids" in grown:
        grown["mm_token_type_ids"] = torch.cat([grown["mm_token_type_ids"], (new * 0).int()], 1)
    grown["position_ids"] = generate_positions(model, grown, prompt)
    with torch.no_grad():
        expected = oracle_attentions(model, grown, alive)
    for step, maps in enumerate(out.attentions[1:]):
        row = prompt + step
        for got, want in zip(maps, expected, strict=True):
            last = got[:, :, -1]
            assert (last[..., : row + 1] - want[:, :, row, : row + 1]).abs().max() < CLOSE
            assert not last[..., row + 1 :].any()
            assert got.shape[3] == (prompt + steps - 1 if cache == "static" else row + 1)


def test_gradients_flow_through_expanded_maps() -> None:
    model = model_of("llava", torch.float32, "eager")
    inputs = make_inputs("llava", [Sample([Text(3), Image(), Text(4)])], dtype=torch.float32)
    with compressed(model, "fastv", keep_ratio=0.5, layer=2):
        maps = model(**inputs, output_attentions=True).attentions
    weight = model.model.language_model.layers[3].self_attn.q_proj.weight
    (gradient,) = torch.autograd.grad(maps[3].square().sum(), [weight])
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("asked", [[-1], [0, 3], 2])
def test_chosen_hidden_states_are_expanded_and_the_others_left_out(asked: Any) -> None:
    """Not of LLaVA, which looks for its encoder's layer among them. Versions differ in what they
    give and where; the compressed model's states stand where the untouched one's do.
    """
    model = model_of("qwen2_5_vl", torch.float32)
    inputs = make_inputs("qwen2_5_vl", [Sample([Text(3), Image(), Text(4)])], dtype=torch.float32)

    def states() -> tuple[Any, Any]:
        with torch.no_grad():
            every = model(**inputs, output_hidden_states=True).hidden_states
            return every, model(**inputs, output_hidden_states=asked).hidden_states

    plain_every, plain = states()
    with compressed(model, "fastv", keep_ratio=0.5, layer=2):
        every, some = states()
    assert len(every) == 7
    for number, hidden in enumerate(plain):
        if hidden is None:
            assert some[number] is None
        else:
            same = [torch.equal(each, hidden) for each in plain_every]
            assert torch.equal(some[number], every[same.index(True)])
