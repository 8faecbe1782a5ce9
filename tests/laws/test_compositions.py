"""The laws for methods inside of methods: wrappers, ensembles, and chains of them."""

from typing import Any

import pytest
import torch
from tests.laws.cases import (
    SAMPLES,
    Spy,
    greedy,
    inputs_of,
    logits_of,
    make,
    model_of,
    real_positions,
    run,
)
from tests.laws.test_law01_prune_equals_mask import assert_equals_oracle
from tests.laws.test_law04_batched_equals_alone import kept_of
from tests.tiny import Image, Sample, Text, make_inputs

from vispress import compress_model, compressed, compression_report, remove_compression
from vispress.methods import (
    VTCCLS,
    Debias,
    Ensemble,
    FasterVLM,
    FastV,
    MaxNorm,
    PerImage,
    PyramidDrop,
    Random,
    RandomMix,
    SparseVLM,
    TransPrune,
)
from vispress.methods.base import Compressor

COLUMNS = FasterVLM(scores="column_mean")
MANY = VTCCLS(scores="column_mean", start_layer=1)

COMPOSITIONS: dict[str, Compressor | list[Compressor]] = {
    "debias-pyramiddrop": Debias(inner=PyramidDrop()),
    "debias-sparsevlm": Debias(inner=SparseVLM()),
    "debias-transprune": Debias(inner=TransPrune(), slope=3.0),
    "debias-shrink": Debias(shrink=True, keep_ratio=0.6),
    "mix-debias": RandomMix(inner=Debias(keep_ratio=0.4), share=0.4),
    # parts that read other encoder layers than each other
    "ensemble": Ensemble(parts=(COLUMNS, MANY, MaxNorm()), keep_ratio=0.4),
    "ensemble-in-llm": Ensemble(parts=(FastV(), FastV()), weights=(1.0, 2.0), keep_ratio=0.4),
    "mix-ensemble": RandomMix(inner=Ensemble(parts=(COLUMNS, MANY), keep_ratio=0.4), share=0.3),
    "per-image": PerImage(inner=Debias(inner=PyramidDrop()), factors=(1.0, 0.3)),
    "chain": [
        Ensemble(parts=(COLUMNS, MANY), keep_ratio=0.7),
        Debias(inner=PyramidDrop(layers=(1, 3), ratios=(0.6, 0.3))),
    ],
}
FAMILIES = ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl"]
CASES = [(family, name) for family in FAMILIES for name in COMPOSITIONS]


def inputs_with_padding(family: str, only: int | None = None) -> dict[str, Any]:
    """The common batch; LLaVA's pictures have bands above and below, the last one none."""
    inputs = inputs_of(family) if only is None else make_inputs(family, SAMPLES, only=only)
    inputs = dict(inputs)
    if family == "llava" and "pixel_values" in inputs:
        pixels = inputs["pixel_values"].clone()
        last = only in (None, 2)
        padded = pixels[:-1] if last else pixels
        padded[:, :, :5] = padded[:, :, -5:] = 0.004
        inputs["pixel_values"] = pixels
    return inputs


@pytest.mark.some(cases=30)
@pytest.mark.parametrize(("family", "name"), CASES)
def test_compositions_equal_the_masked_model(family: str, name: str) -> None:
    model, inputs = model_of(family), inputs_with_padding(family)
    result = run(model, inputs, COMPOSITIONS[name])
    whole = sum(i.num_visual for s in result.report.samples for i in s.images)
    assert sum(result.report.visual_per_layer[-1]) < whole
    assert_equals_oracle(model, inputs, result)


@pytest.mark.some(cases=12)
@pytest.mark.parametrize(("family", "name"), CASES)
def test_compositions_in_a_batch_give_what_they_give_alone(family: str, name: str) -> None:
    model, batch = model_of(family), inputs_with_padding(family)
    with compressed(model, COMPOSITIONS[name]):
        together = logits_of(model, real_positions(family, batch))
        kept = kept_of(model)
    for index in range(len(SAMPLES)):
        single = inputs_with_padding(family, index)
        with compressed(model, COMPOSITIONS[name]):
            alone = logits_of(model, real_positions(family, single))[0]
            assert kept[index] == kept_of(model)[0]
        real = batch["attention_mask"][index].bool()
        assert (together[index][real] - alone).abs().max() < 1e-9


@pytest.mark.some(cases=8)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions_leave_nothing_behind(family: str, name: str) -> None:
    model, inputs = model_of(family), inputs_with_padding(family)
    before = logits_of(model, inputs)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    with compressed(model, COMPOSITIONS[name]):
        greedy(model, inputs, 2)
    assert torch.equal(logits_of(model, inputs), before)
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


@pytest.mark.parametrize(
    "method",
    [
        Debias(keep_ratio=1.0),
        Debias(keep_ratio=1.0, shrink=True),
        Debias(inner=PyramidDrop(keep_ratio=1.0)),
        RandomMix(keep_ratio=1.0, share=0.5),
        Ensemble(parts=(COLUMNS, MANY), keep_ratio=1.0),
    ],
    ids=lambda method: method.name,
)
def test_keeping_everything_is_the_identity(method: Compressor) -> None:
    model, inputs = model_of("llava"), inputs_with_padding("llava")
    before = logits_of(model, inputs)
    with compressed(model, method):
        assert torch.equal(logits_of(model, inputs), before)


def test_images_of_one_prompt_keep_their_own_share() -> None:
    for family in ("llava", "qwen2_5_vl"):
        model = model_of(family)
        with compressed(model, PerImage(keep_ratio=0.75, factors=(1.0, 0.333333))):
            logits_of(model, inputs_of(family))
            samples = compression_report(model).samples
        shares = [[image.num_kept / image.num_visual for image in s.images] for s in samples]
        assert [[round(share, 2) for share in own] for own in shares] == [[0.75], [], [0.75, 0.25]]


# --- padding, from the pixels to what is kept


def kept_rows(method: Compressor, inputs: dict[str, Any]) -> list[set[int]]:
    """Rows of the 6 x 6 raster of which anything is kept, for each picture."""
    model = model_of("llava")
    with compressed(model, method):
        logits_of(model, inputs)
        images = [i for s in compression_report(model).samples for i in s.images]
    return [{place // 6 for place in image.kept} for image in images]


def test_padding_is_found_in_pixels_and_not_kept() -> None:
    inputs = inputs_with_padding("llava")
    side = inputs["pixel_values"].shape[-1]
    assert side % 6 == 0
    plain = kept_rows(FastV(keep_ratio=0.5, layer=2), inputs)
    padding = kept_rows(Debias(inner=FastV(layer=2), keep_ratio=0.5, slope=0.0), inputs)
    # five of the pixels at each end: one row of patches and a quarter of the next
    assert side // 6 == 4
    assert any({0, 5} & rows for rows in plain[:2])
    assert not any({0, 5} & rows for rows in padding[:2])
    assert padding[2] == plain[2]  # this picture has none
    strict = kept_rows(
        Debias(inner=FastV(layer=2), keep_ratio=0.3, slope=0.0, threshold=0.1), inputs
    )
    assert all(rows <= {2, 3} for rows in strict[:2])


def test_shrink_keeps_only_what_is_no_padding() -> None:
    inputs, model = inputs_with_padding("llava"), model_of("llava")
    method = Debias(inner=FastV(layer=2), num_tokens=30, shrink=True)
    with compressed(model, method):
        logits_of(model, inputs)
        images = [i for s in compression_report(model).samples for i in s.images]
    assert [image.num_kept for image in images] == [24, 24, 30]


def test_generate_sees_the_same_padding_as_a_forward() -> None:
    """`generate` runs the encoder ahead of the forward."""
    inputs, model = inputs_with_padding("llava"), model_of("llava")
    compress_model(model, Debias(inner=FastV(layer=2), keep_ratio=0.5, slope=0.0))
    try:
        logits_of(model, real_positions("llava", inputs))
        forward = kept_of(model)
        greedy(model, inputs, 1)
        assert kept_of(model) == forward
    finally:
        remove_compression(model)


def test_a_family_without_padding_is_told_so_in_the_report() -> None:
    for family, said in (("llava", False), ("qwen2_5_vl", True)):
        model = model_of(family)
        with compressed(model, Debias(keep_ratio=0.5)):
            logits_of(model, inputs_of(family))
            notes = compression_report(model).notes
        assert any("no padding" in note for note in notes) == said
        explicit = Debias(inner=FastV(layer=2), keep_ratio=0.5, suppress_padding=False)
        with compressed(model, explicit):
            logits_of(model, inputs_of(family))
            assert compression_report(model).notes == ()


def test_the_order_of_encoder_layers_is_each_parts_own() -> None:
    """Parts that read other layers keep, with all the weight, what they keep alone."""
    model, inputs = model_of("llava_next"), inputs_of("llava_next")
    for weights, alone in (((1.0, 0.0), COLUMNS), ((0.0, 1.0), MANY)):
        mixed = Ensemble(parts=(COLUMNS, MANY), weights=weights, keep_ratio=0.4)
        found = []
        for method in (mixed, type(alone)(**alone.hyperparameters() | {"keep_ratio": 0.4})):
            with compressed(model, method):
                logits_of(model, inputs)
                found.append(kept_of(model))
        assert found[0] == found[1]


AXES = {
    "cls_attention": -1,
    "column_attention": -1,
    "vision_keys": 2,
    "vision_features": 1,
    "padding": 1,
}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", ["visionzip", "vscan", "fastervlm"])
def test_a_later_method_is_shown_the_encoders_signals_of_what_is_left(
    family: str, method: str
) -> None:
    """The oracle takes any choice, and so any signal."""
    model = model_of(family)
    inputs = make_inputs(family, [Sample([Text(5), Image(), Text(4)])])
    alone, behind = Spy(), Spy()
    with compressed(model, alone.watch(make(family, method))):
        logits_of(model, inputs)
    with compressed(model, [Random(keep_ratio=0.5), behind.watch(make(family, method))]):
        logits_of(model, inputs)
    (whole, _), (left, _) = alone.seen[0], behind.seen[0]
    assert 0 < left.num_visual < whole.num_visual
    read = [name for name in AXES if getattr(whole, name) is not None]
    assert read
    for name in read:
        axis = AXES[name]
        expected = getattr(whole, name).index_select(axis, left.index[0])
        torch.testing.assert_close(getattr(left, name), expected)
