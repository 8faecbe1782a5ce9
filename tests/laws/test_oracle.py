"""The oracle itself: against the plain model, against shortened sequences, and sample by sample."""

from typing import Any

import pytest
import torch
from tests.laws.oracle import (
    all_alive,
    dropped_from,
    generate_positions,
    language_model,
    oracle_expand,
    oracle_forward,
    oracle_generate,
    oracle_loss,
)
from tests.tiny import (
    FAMILIES,
    QWEN,
    Image,
    Sample,
    Text,
    Video,
    build,
    features,
    make_inputs,
    visual_positions,
)
from torch import Tensor

BATCH = [
    Sample([Text(6), Image(4, 4), Text(4), Image(3, 6), Text(5)]),
    Sample([Text(3), Image(5, 3), Text(2)]),
    Sample([Text(7)]),
]
CASES = [(f, "original") for f in FAMILIES] + [(f, "compact") for f in FAMILIES if f not in QWEN]
TIGHT = 1e-9
ROUNDED = 2e-6
"""`generate` hands out its logits in fp32."""


def drop_some(family: str, model: Any, inputs: dict[str, Any], keep_every: int) -> Tensor:
    """`[B, L]` bool: all visual tokens but every `keep_every`-th one of each image."""
    drop = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, items in zip(drop, visual_positions(family, model, inputs), strict=True):
        for places in items:
            row[places] = True
            row[places[::keep_every]] = False
    return drop


def embed(model: Any, inputs: dict[str, Any]) -> Tensor:
    """`[B, L, D]`: the language model's input, put together by hand."""
    rows = model.get_input_embeddings()(inputs["input_ids"]).detach()
    found = torch.cat(features(model, inputs, "image"))
    return rows.masked_scatter((inputs["input_ids"] == 120)[..., None], found)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_everything_alive_it_is_the_plain_model(family: str, padding: str) -> None:
    model, inputs = build(family), make_inputs(family, BATCH, padding=padding)
    with torch.no_grad():
        plain = model(**inputs).logits
        logits = oracle_forward(model, inputs, all_alive(model, inputs))
    assert logits.isfinite().all()
    assert (logits - plain)[inputs["attention_mask"].bool()].abs().max() <= TIGHT


@pytest.mark.parametrize("family", FAMILIES)
def test_with_everything_alive_it_generates_what_generate_does(family: str) -> None:
    model, inputs = build(family), make_inputs(family, BATCH, padding="left")
    tokens, logits = oracle_generate(model, inputs, all_alive(model, inputs), 5)
    out = model.generate(
        **inputs,
        max_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences[:, -5:], tokens)
    assert (torch.stack(out.logits, 1) - logits).abs().max() <= ROUNDED


@pytest.mark.parametrize("family", QWEN)
def test_positions_behind_a_long_video_are_those_of_generate(family: str) -> None:
    samples = [Sample([Text(3), Video(7, 2, 2), Text(2)]), Sample([Text(4), Image(2, 5), Text(1)])]
    model, inputs = build(family), make_inputs(family, samples, padding="left")
    tokens, logits = oracle_generate(model, inputs, all_alive(model, inputs), 4)
    out = model.generate(
        **inputs,
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences[:, -4:], tokens)
    assert (torch.stack(out.logits, 1) - logits).abs().max() <= ROUNDED


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in QWEN])
def test_compact_drop_before_layer_0_is_a_shorter_sequence(family: str) -> None:
    model, inputs = build(family), make_inputs(family, BATCH[:1])
    drop = drop_some(family, model, inputs, 3)
    alive = dropped_from(all_alive(model, inputs), 0, drop)
    with torch.no_grad():
        logits = oracle_forward(model, inputs, alive, "compact")[alive[0]]
        short = embed(model, inputs)[alive[0]][None]
        plain = model(inputs_embeds=short, use_cache=False).logits[0]
    assert 10 < len(plain) < drop.shape[1] - 10
    assert (logits - plain).abs().max() <= TIGHT


@pytest.mark.parametrize(("family", "positions"), CASES)
def test_drop_before_layer_2_is_a_loop_over_shorter_rows(family: str, positions: Any) -> None:
    model, inputs = build(family), make_inputs(family, BATCH[:1])
    alive = dropped_from(all_alive(model, inputs), 2, drop_some(family, model, inputs, 3))
    with torch.no_grad():
        logits = oracle_forward(model, inputs, alive, positions)[alive[-1]]
        stack, hidden = language_model(model), embed(model, inputs)
        length = hidden.shape[1]
        places = generate_positions(model, inputs, length)
        visual = inputs["input_ids"][0] == 120
        deep = []
        if family == "qwen3_vl":
            names = ("pixel_values", "image_grid_thw")
            found = model.model.get_image_features(*(inputs[n] for n in names), return_dict=True)
            for level in found.deepstack_features:
                joined = level if isinstance(level, Tensor) else torch.cat(level)
                deep.append(torch.zeros_like(hidden))
                deep[-1][0, visual] = joined
        for i, layer in enumerate(stack.layers):
            if i == 2:
                rows = alive[2][0].nonzero().flatten()
                hidden, places = hidden[:, rows], places[..., rows]
                deep = [d[:, rows] for d in deep]
                if positions == "compact":
                    places = torch.arange(len(rows))[None]
            tables = stack.rotary_emb(hidden, places)
            hidden = layer(hidden, attention_mask=None, position_embeddings=tables)
            if i < len(deep):
                hidden = hidden + deep[i]
        expected = model.lm_head(stack.norm(hidden))[0]
    assert 10 < len(expected) < length - 10
    assert (logits - expected).abs().max() <= TIGHT


@pytest.mark.some(cases=5)
@pytest.mark.parametrize(("family", "positions"), CASES)
def test_a_left_padded_batch_is_its_samples_alone(family: str, positions: Any) -> None:
    model = build(family)

    def run(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        inputs["position_ids"] = generate_positions(model, inputs, inputs["input_ids"].shape[1])
        alive = dropped_from(all_alive(model, inputs), 0, drop_some(family, model, inputs, 2))
        alive = dropped_from(alive, 3, drop_some(family, model, inputs, 5))
        tokens, _ = oracle_generate(model, inputs, alive, 3, positions)
        return oracle_forward(model, inputs, alive, positions), tokens

    with torch.no_grad():
        together, tokens = run(make_inputs(family, BATCH, padding="left"))
        for i in range(len(BATCH)):
            alone, own = run(make_inputs(family, BATCH, only=i))
            assert (together[i, -alone.shape[1] :] - alone[0]).abs().max() <= TIGHT
            assert torch.equal(tokens[i], own[0])


def test_eager_agrees_with_sdpa() -> None:
    inputs = make_inputs("llava", BATCH, padding="left", dtype=torch.float32)
    found = []
    for attn in ("sdpa", "eager"):
        model = build("llava", dtype=torch.float32, attn=attn)
        drop = drop_some("llava", model, inputs, 3)
        alive = dropped_from(all_alive(model, inputs), 1, drop)
        with torch.no_grad():
            found.append(oracle_forward(model, inputs, alive, "compact"))
    assert found[1].isfinite().all()
    assert (found[0] - found[1])[alive[-1]].abs().max() < 1e-3


def test_values_replace_rows_before_their_layer() -> None:
    model, inputs = build("llava"), make_inputs("llava", BATCH[:1])
    first = visual_positions("llava", model, inputs)[0][0][:2]
    rows = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    rows[0, first] = True
    new = torch.randn(2, 64, dtype=torch.float64)
    with torch.no_grad():
        logits = oracle_forward(model, inputs, all_alive(model, inputs), values={0: (rows, new)})
        changed = embed(model, inputs)
        changed[0, first] = new
        plain = model(inputs_embeds=changed, use_cache=False).logits
        later = oracle_forward(model, inputs, all_alive(model, inputs), values={2: (rows, new)})
    assert (logits - plain).abs().max() <= TIGHT
    assert (later - plain).abs().max() > 0.1


def test_expand_takes_the_nearest_earlier_survivor() -> None:
    last = torch.tensor([[0, 0, 1, 0, 1, 1, 0]]).bool()
    logits = torch.arange(7.0)[None, :, None].expand(1, 7, 2)
    assert oracle_expand(logits, last)[0, :, 0].tolist() == [2, 2, 2, 2, 4, 5, 5]


def test_no_gradient_reaches_what_was_dropped_before_layer_0() -> None:
    model, inputs = build("llava"), make_inputs("llava", BATCH, padding="right")
    first, second = visual_positions("llava", model, inputs)[0]
    drop = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    drop[0, second] = True
    inputs["pixel_values"].requires_grad_()
    # the label behind the dropped image is predicted at its last place, so by an earlier survivor
    labels = inputs["input_ids"].masked_fill(~inputs["attention_mask"].bool(), -100)
    alive = dropped_from(all_alive(model, inputs), 0, drop)
    loss = oracle_loss(model, inputs, labels.masked_fill(labels == 120, -100), alive)
    loss.backward()
    gradient = inputs["pixel_values"].grad.flatten(1).abs().amax(1)
    assert gradient[1] == 0
    assert gradient[0] > 1e-6
    assert gradient[2] > 1e-6
    assert first[0] < second[0]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_it_leaves_no_trace(family: str) -> None:
    model, inputs = build(family), make_inputs(family, BATCH, padding="left")
    marker = object()  # what an earlier prompt left on the module
    if family in QWEN:
        model.model.rope_deltas = marker
    oracle_forward(model, inputs, all_alive(model, inputs))
    oracle_generate(model, inputs, all_alive(model, inputs), 2)
    assert not any(m._forward_pre_hooks for m in model.modules())
    if family in QWEN:
        assert model.model.rope_deltas is marker


def test_refusals() -> None:
    qwen, inputs = build("qwen2_vl"), make_inputs("qwen2_vl", BATCH[:1])
    alive = all_alive(qwen, inputs)
    with pytest.raises(ValueError, match="M-RoPE"):
        oracle_forward(qwen, inputs, alive, "compact")
    with pytest.raises(ValueError, match="masks for 6"):
        oracle_forward(qwen, inputs, alive[:3])
    handle = language_model(qwen).layers[1].register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="untouched"):
        oracle_forward(qwen, inputs, alive)
    handle.remove()
