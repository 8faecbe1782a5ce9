"""Law 1: a compressed model computes what the untouched one does with the dropped tokens masked."""

from typing import Any

import pytest
import torch
from tests.laws.cases import (
    DROPPING,
    FAMILIES,
    MASKING,
    cases,
    encoding_as,
    inputs_of,
    make,
    model_of,
    on_videos,
    real_positions,
    run,
)
from tests.laws.oracle import oracle_expand, oracle_forward, oracle_generate
from tests.tiny import Image, Sample, Text, Video, make_inputs

from vispress import compress_model, remove_compression
from vispress.adapters.base import find_adapter
from vispress.methods import DivPrune, FastV, PyramidDrop, Random

EXACT = 1e-5  # logits of scale 20, fp64 weights; norms and rotary tables are fp32 in transformers


def assert_equals_oracle(
    model: Any, inputs: dict[str, Any], result: Any, tolerance: float = EXACT
) -> None:
    """All logits at real positions, those of dropped places included."""
    with encoding_as(model, result.encoded):
        masked = oracle_forward(model, inputs, result.alive, result.positions, result.values)
    expected = oracle_expand(masked, result.alive[-1])
    real = inputs["attention_mask"].bool()
    assert (result.logits - expected)[real].abs().max() < tolerance


@pytest.mark.parametrize(("family", "method"), cases(1, DROPPING))
def test_prefill_equals_the_masked_model(family: str, method: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    result = run(model, inputs, make(family, method))
    assert result.report.mean_keep_ratio < 1.0
    assert_equals_oracle(model, inputs, result)


@pytest.mark.parametrize(("family", "method"), cases("decode steps", DROPPING))
def test_every_decode_step_equals_the_masked_model(family: str, method: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    # as generate counts positions: norms of rotated keys (DART) depend on them
    result = run(model, real_positions(family, inputs), make(family, method))
    with encoding_as(model, result.encoded):
        tokens, logits = oracle_generate(
            model, inputs, result.alive, 4, result.positions, result.values
        )
    compress_model(model, make(family, method))
    try:
        out = model.generate(
            **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    finally:
        remove_compression(model)
    start = inputs["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, start:], tokens)
    assert (torch.stack(out.logits, dim=1) - logits).abs().max() < EXACT


FOUR = [(f, m) for f in FAMILIES for m in ("fastv", "divprune", "pyramiddrop", "visionzip")]


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize(("family", "method"), cases(1, FOUR))
def test_both_position_policies_equal_the_masked_model(
    family: str, method: str, positions: Any
) -> None:
    model, inputs = model_of(family), inputs_of(family)
    if positions == "compact" and find_adapter(model).mrope:
        with pytest.raises(ValueError, match="three axes"):
            compress_model(model, make(family, method), positions=positions)
        return
    result = run(model, inputs, make(family, method), positions=positions)
    assert_equals_oracle(model, inputs, result)
    tokens, logits = oracle_generate(model, inputs, result.alive, 3, positions, result.values)
    compress_model(model, make(family, method), positions=positions)
    try:
        out = model.generate(
            **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    finally:
        remove_compression(model)
    assert torch.equal(out.sequences[:, inputs["input_ids"].shape[1] :], tokens)
    assert (torch.stack(out.logits, dim=1) - logits).abs().max() < EXACT


CHAINS = {
    "pre_then_in": [DivPrune(keep_ratio=0.6), FastV(keep_ratio=0.5, layer=2)],
    "three": [
        Random(keep_ratio=0.7),
        FastV(keep_ratio=0.7, layer=1),
        FastV(keep_ratio=0.5, layer=4),
    ],
    "schedule_last": [DivPrune(keep_ratio=0.5), PyramidDrop()],
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("family", FAMILIES)
def test_chains_equal_the_masked_model(family: str, chain: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    result = run(model, inputs, CHAINS[chain], positions="original")
    assert_equals_oracle(model, inputs, result)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_eager_and_right_padding(family: str, attn: str, padding: str) -> None:
    model = model_of(family, torch.float32, attn)
    inputs = inputs_of(family, padding, torch.float32)
    for method in ("fastv", "divprune"):
        result = run(model, inputs, make(family, method))
        assert_equals_oracle(model, inputs, result, tolerance=1e-3)


def test_a_wrong_alive_mask_is_noticed() -> None:
    """The comparison can fail: one token more in the oracle is seen."""
    model, inputs = model_of("llava"), inputs_of("llava")
    result = run(model, inputs, make("llava", "fastv"))
    image = result.report.samples[0].images[0]
    lost = next(i for i in range(image.num_visual) if i not in image.kept)
    alive = result.alive
    alive[-1] = alive[-1].clone()
    alive[-1][0, image.positions[lost]] = True
    masked = oracle_forward(model, inputs, alive, result.positions)
    expected = oracle_expand(masked, alive[-1])
    assert (result.logits - expected)[inputs["attention_mask"].bool()].abs().max() > 1e-3


def test_report_and_alive_agree() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    result = run(model, inputs, make("llava", "pyramiddrop"))
    for b, sample in enumerate(result.report.samples):
        for image in sample.images:
            last = result.report.alive(result.report.num_layers - 1)[b]
            here = [i for i, p in enumerate(image.positions) if last[p]]
            assert tuple(here) == image.kept


@pytest.mark.parametrize(
    ("family", "method"),
    cases("images and videos", [case for case in on_videos() if case[1] not in MASKING]),
)
def test_images_and_videos_in_one_batch_equal_the_masked_model(family: str, method: str) -> None:
    model = model_of(family)
    samples = [
        Sample([Text(3), Video(3, 4, 4), Text(4), Image(4, 4), Text(5)]),
        Sample([Text(2), Image(4, 6), Text(3)]),
    ]
    inputs = make_inputs(family, samples, padding="left")
    result = run(model, inputs, make(family, method))
    kinds = [[image.modality for image in sample.images] for sample in result.report.samples]
    assert kinds == [["video", "image"], ["image"]]
    assert_equals_oracle(model, inputs, result)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prumerge", {"keep_ratio": None}),
        ("prumerge", {"keep_ratio": None, "plus": True}),
        ("sparsevlm", {"layers": (2,), "ratios": (0.5,), "rank_scale": 1.0, "rank_bias": 1.0}),
    ],
)
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl"])
def test_counts_that_images_decide_equal_the_masked_model(
    family: str, method: str, options: dict[str, Any]
) -> None:
    model, inputs = model_of(family), inputs_of(family)
    result = run(model, inputs, make(family, method, **options))
    images = [image for sample in result.report.samples for image in sample.images]
    counts = [len(image.kept) for image in images]
    assert all(0 < n <= image.num_visual for n, image in zip(counts, images, strict=True))
    assert sum(counts) < sum(image.num_visual for image in images) or "plus" in options
    assert_equals_oracle(model, inputs, result)


def test_one_layer_can_be_read_ahead_and_while_it_runs() -> None:
    """PyramidDrop peeks at layer 2, FastV before layer 3 reads layer 2 as it ran, on fewer rows."""
    model, inputs = model_of("llava"), inputs_of("llava")
    chain = [PyramidDrop(layers=(2,), keep_ratio=0.7), FastV(keep_ratio=0.5, layer=3)]
    result = run(model, inputs, chain, positions="original")
    assert_equals_oracle(model, inputs, result)
