"""Merging inside the vision encoder: what it computes, what it leaves alone, what it refuses."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.laws.cases import FAMILIES, QWEN, inputs_of, logits_of, model_of, run
from tests.laws.slow_tome import Line, Token, run_layer
from tests.laws.test_law01_prune_equals_mask import assert_equals_oracle
from tests.laws.test_law03_removal import assert_as_before, before
from tests.laws.test_law10_training import checkpointing, loss_of, training
from tests.tiny import VIDEO, Sample, Text, Video, build, make_inputs
from torch import Tensor

from vispress import compress_model, compressed, compression_report, remove_compression
from vispress.adapters.base import find_adapter
from vispress.errors import ConfigError, UnsupportedMethodError
from vispress.methods import DivPrune, FasterVLM, FastV, ToMe

EXACT = 1e-5


@contextmanager
def watched(adapter: Any) -> Any:
    """Notes the first layer's input, the rotary tables, and what the projector is given."""
    seen: dict[str, Any] = {}
    block = adapter.encoder_blocks()[0]

    def first(_: Any, args: Any, kwargs: Any) -> None:
        seen["x"], seen["rotary"] = args[0].clone(), kwargs.get("position_embeddings")

    def last(_: Any, args: Any) -> None:
        seen["features"] = args[0]

    handles = [
        block.layer.register_forward_pre_hook(first, with_kwargs=True, prepend=True),
        adapter.projector.register_forward_pre_hook(last),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def shuffled(x: Tensor, side: int) -> list[list[int]]:
    """Patches of each token of a `side x side` tile whose 2 x 2 patches are joined."""
    grid = torch.arange(side * side).view(side, side)
    return [
        sorted(grid[r : r + 2, c : c + 2].flatten().tolist())
        for r in range(0, side, 2)
        for c in range(0, side, 2)
    ]


def lines_of(family: str, model: Any, inputs: Any, seen: Any) -> tuple[list[Line], list[Any]]:
    """The encoder's sequences before the first layer, and the rows that each token has."""
    x, rotary = seen["x"], seen["rotary"]
    lines, rows = [], []
    if family in QWEN:
        start, frame = 0, 0
        for t, h, w in inputs["image_grid_thw"].tolist():
            for _ in range(t):
                for size in windows(h // 2, w // 2) if family == "qwen2_5_vl" else [h * w // 4]:
                    own = [slice(start + 4 * i, start + 4 * i + 4) for i in range(size)]
                    tokens = [
                        Token(x[s], tuple(table[s] for table in rotary), [len(rows) + i])
                        for i, s in enumerate(own)
                    ]
                    lines.append(Line(None, tokens, frame))
                    rows += [(None, s) for s in own]
                    start += 4 * size
                frame += 1
        return lines, rows
    prefix = 1 if find_adapter(model).has_cls else 0
    n = x.shape[1] - prefix
    units = shuffled(x, round(n**0.5)) if family == "internvl" else [[i] for i in range(n)]
    for number, sequence in enumerate(x):
        tokens = [
            Token(sequence[[prefix + i for i in unit]], None, [len(rows) + i])
            for i, unit in enumerate(units)
        ]
        lines.append(Line(sequence[:1] if prefix else None, tokens, number))
        rows += [(number, [prefix + i for i in unit]) for unit in units]
    return lines, rows


def windows(h: int, w: int) -> list[int]:
    """Tokens of each window of 2 x 2, cut at the right and below."""
    return [min(2, h - r) * min(2, w - c) for r in range(0, h, 2) for c in range(0, w, 2)]


@pytest.mark.parametrize("merges", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_merging_written_out(family: str, merges: int) -> None:
    """Schedules of 1 and 3 tokens a layer; in windows of four, fewer are left to merge."""

    class Fixed(ToMe):  # type: ignore[misc]
        def merges_per_layer(self, num_tokens: int, num_keep: int, num_layers: int) -> Any:
            counts = []
            for _ in range(num_layers):
                counts.append(min(merges, num_tokens // 2))
                num_tokens -= counts[-1]
            return tuple(counts)

    model, inputs = model_of(family), inputs_of(family)
    adapter = find_adapter(model)
    blocks = adapter.encoder_blocks()
    with torch.no_grad(), watched(adapter) as seen, compressed(model, Fixed(keep_ratio=0.5)):
        model(**inputs)
    lines, rows = lines_of(family, model, inputs, seen)
    full = getattr(getattr(model.model, "visual", None), "fullatt_block_indexes", ())
    with torch.no_grad():
        for number, block in enumerate(blocks):
            alone = family == "qwen2_5_vl" and number not in full
            run_layer(family, block.layer, lines, alone=alone, merges=merges)
    features = seen["features"]
    if family == "internvl":  # the pixel shuffle comes ahead of its projector
        ratio, side = model.config.downsample_ratio, model.config.vision_config.image_size[0] // 4
        expected = torch.zeros(len(features), side * side, 32, dtype=features.dtype)
    else:
        expected = torch.zeros_like(features)
    groups = 0
    prefix = 1 if adapter.has_cls else 0
    for line in lines:
        groups += len(line.tokens)
        for token in line.tokens:
            for member in token.members:
                number, own = rows[member]
                if number is None:
                    expected[own] = token.rows
                else:
                    expected[number, [i - prefix for i in own]] = token.rows
    if family == "internvl":
        grid = expected.view(len(features), side, side, -1)
        expected = model.model.pixel_shuffle(grid, scale_factor=ratio).flatten(1, 2)
    assert groups < len(rows)
    assert (features - expected).abs().max() < EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chain_behind_the_encoder_equals_the_masked_model(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    chain = [ToMe(keep_ratio=0.6), DivPrune(keep_ratio=0.6), FastV(keep_ratio=0.5, layer=2)]
    result = run(model, inputs, chain, positions="original")
    for sample in result.report.samples:
        for image in sample.images:
            counts = [round(0.6 * image.num_visual)]
            counts += [round(0.6 * counts[0])]
            assert [p.num_kept for p in image.placements] == [*counts, round(0.5 * counts[1])]
    assert_equals_oracle(model, inputs, result)


@pytest.mark.parametrize("family", FAMILIES)
def test_restored_tokens_all_reach_the_llm_as_copies(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    chain = [ToMe(keep_ratio=0.4, restore=True), FastV(keep_ratio=0.5, layer=2)]
    result = run(model, inputs, chain, positions="original")
    for sample in result.report.samples:
        for image in sample.images:
            assert image.placements[0].num_kept == image.num_visual
            assert image.encoder is not None
            assert image.encoder.num_left < image.encoder.num_tokens
    assert_equals_oracle(model, inputs, result)


def test_the_report_counts_the_encoder_apart_from_the_llm() -> None:
    model, inputs = model_of("llava_next"), inputs_of("llava_next")
    with compressed(model, "tome", keep_ratio=0.5) as report:
        logits_of(model, inputs)
        images = [image for sample in report.samples for image in sample.images]
        text = str(report)
    layers = len(find_adapter(model).encoder_blocks())
    for image in images:
        assert image.encoder is not None
        crops = image.encoder.num_tokens // 16
        per_layer = [16 * crops - (8 * crops * (i + 1)) // layers for i in range(layers)]
        assert image.encoder.num_left == 8 * crops == image.encoder.per_layer[-1]
        assert abs(image.encoder.per_layer[0] - per_layer[0]) <= crops
        assert image.num_kept == round(0.5 * image.num_visual)
        assert f"encoder {8 * crops} of {16 * crops}" in text
    with compressed(model, "divprune", keep_ratio=0.5) as report:
        logits_of(model, inputs)
        assert report.samples[0].images[0].encoder is None


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl"])
def test_a_model_that_never_ran_merges_as_one_that_did(family: str, attn: str) -> None:
    """transformers' hooks that keep hidden states come at the first forward, behind ours."""
    inputs = inputs_of(family, dtype=torch.float32)
    expected = run(model_of(family, torch.float32), inputs, ToMe(keep_ratio=0.4)).logits
    fresh = build(family, dtype=torch.float32, attn=attn)
    got = run(fresh, inputs, ToMe(keep_ratio=0.4)).logits
    assert (got - expected)[inputs["attention_mask"].bool()].abs().max() < 1e-3


@pytest.mark.parametrize("family", VIDEO)
def test_frames_of_videos_merge_each_by_itself(family: str) -> None:
    samples = [Sample([Text(4), Video(2, 4, 4), Text(3)]), Sample([Text(2), Video(2, 4, 4)])]
    model = model_of(family)
    inputs = make_inputs(family, samples, padding="left")
    result = run(model, inputs, ToMe(keep_ratio=0.4))
    for sample in result.report.samples:
        (video,) = sample.images
        assert video.num_kept == round(0.4 * video.num_visual)
        assert video.encoder is not None
        assert video.encoder.num_left < video.encoder.num_tokens
    assert_equals_oracle(model, inputs, result)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_layers_that_merge_are_not_checkpointed_and_checkpointed_again_afterwards(
    family: str, reentrant: bool
) -> None:
    model, inputs = build(family), inputs_of(family)
    layers = [block.layer for block in find_adapter(model).encoder_blocks()]
    flags: list[bool] = []
    handle = layers[0].register_forward_pre_hook(
        lambda module, _: flags.append(module.gradient_checkpointing)
    )
    with training(model), checkpointing(model, reentrant=reentrant):
        assert all(layer.gradient_checkpointing for layer in layers)
        with compressed(model, ToMe(keep_ratio=0.4)):
            loss_of(model, inputs).backward()
            with pytest.raises((AttributeError, TypeError)):
                model.model.get_image_features(pixel_values="nothing to see")
        assert all(layer.gradient_checkpointing for layer in layers)
        loss_of(model, inputs).backward()
    handle.remove()
    assert flags == [False, True]


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_an_exception_inside_the_encoder_leaves_nothing_behind(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    before(family)
    block = find_adapter(model).encoder_blocks()[1]

    def fail(*_: Any) -> None:
        raise ArithmeticError("in the encoder")

    with compressed(model, ToMe(keep_ratio=0.4)):
        good = logits_of(model, inputs)
        handle = block.mlp.register_forward_hook(fail)
        with pytest.raises(ArithmeticError):
            logits_of(model, inputs)
        handle.remove()
        assert torch.equal(logits_of(model, inputs), good)
    assert_as_before(family)


# --- what is refused


def refused(error: type[Exception], match: str, model: Any, chain: Any) -> None:
    with pytest.raises(error, match=match):
        compress_model(model, chain)
    assert "_vispress_attachment" not in find_adapter(model).base.__dict__


def test_what_reads_the_encoder_behind_a_merge_is_refused() -> None:
    refused(
        UnsupportedMethodError,
        "fastervlm reads cls_attention of the vision encoder's own tokens, which tome merges",
        model_of("llava"),
        [ToMe(keep_ratio=0.5), FasterVLM(keep_ratio=0.5)],
    )


def test_merging_in_the_encoder_comes_first_in_a_chain() -> None:
    chain = [DivPrune(keep_ratio=0.5), ToMe(keep_ratio=0.5)]
    refused(ConfigError, "divprune before it .* order the chain", model_of("llava"), chain)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_attention_that_cannot_weigh_tokens_is_refused(family: str) -> None:
    model = build(family, layers=2)
    config = find_adapter(model).encoder_blocks()[0].attention.config
    inputs = inputs_of(family)
    with compressed(model, ToMe(keep_ratio=0.5)):
        config._attn_implementation_internal = "flash_attention_2"
        with pytest.raises(UnsupportedMethodError, match="flash_attention_2"):
            logits_of(model, inputs)
    refused(
        UnsupportedMethodError,
        "'flash_attention_2' in the vision encoder cannot; these can: sdpa, eager",
        model,
        ToMe(keep_ratio=0.5),
    )


def test_an_encoder_built_another_way_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llava")
    monkeypatch.setattr(type(find_adapter(model)), "encoder_blocks", lambda self: ())
    refused(UnsupportedMethodError, "llava model's vision encoder", model, ToMe(keep_ratio=0.5))
    with pytest.raises(UnsupportedMethodError) as caught:
        compress_model(model, "evs", keep_ratio=0.5)
    assert "tome" not in str(caught.value).split("Methods that work on this model: ")[1]


def test_a_report_of_the_last_prefill_needs_one() -> None:
    model = build("llava", layers=2)
    compress_model(model, ToMe(keep_ratio=0.5))
    with pytest.raises(RuntimeError, match="no visual tokens"):
        compression_report(model)
    remove_compression(model)
