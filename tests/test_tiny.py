"""The tiny models run, show differences, and their inputs cover what the laws need."""

from typing import Any

import pytest
import torch

from tests.tiny import (
    FAMILIES,
    QWEN,
    VIDEO,
    Image,
    Sample,
    Text,
    Video,
    build,
    make_inputs,
    visual_positions,
)

BATCH = [
    Sample([Text(6), Image(4, 4), Text(4), Image(3, 6), Text(5)]),
    Sample([Text(3), Image(5, 3), Text(2)]),
    Sample([Text(7)]),
]


def counts(family: str, model: Any, inputs: dict[str, Any]) -> list[list[int]]:
    return [[len(p) for p in sample] for sample in visual_positions(family, model, inputs)]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_has_logits_on_which_differences_show(family: str, padding: str) -> None:
    model, inputs = build(family), make_inputs(family, BATCH, padding=padding)
    with torch.no_grad():
        logits = model(**inputs).logits
    valid = logits[inputs["attention_mask"].bool()]
    assert valid.isfinite().all()
    assert 4 < valid.std() < 10
    assert 15 < valid.abs().max() < 50
    first = visual_positions(family, model, inputs)[0][0]
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][0, first[: len(first) // 2]] = 0
    if family in QWEN:  # keep M-RoPE as it was: only attention is masked here
        positions, _ = model.model.get_rope_index(
            **{k: v for k, v in inputs.items() if k in ("input_ids", "mm_token_type_ids")},
            image_grid_thw=inputs["image_grid_thw"],
        )
        inputs["position_ids"] = positions
    with torch.no_grad():
        masked = model(**inputs).logits
    assert (masked - logits)[0, first[-1] + 1 :].abs().max() > 0.5


@pytest.mark.slow(cases=3)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_never_stops_early_and_draws_no_placeholder(family: str) -> None:
    model, inputs = build(family), make_inputs(family, BATCH, padding="left")
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    assert new.shape == (3, 6)
    assert ((new > 0) & ((new < 120) | (new > 123))).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_far_from_uniform(family: str) -> None:
    model = build(family, dtype=torch.float32, attn="eager")
    inputs = make_inputs(family, [Sample()], dtype=torch.float32)
    with torch.no_grad():
        rows = torch.stack(
            [a[0, :, -1] for a in model(**inputs, output_attentions=True).attentions]
        )
    assert (rows.amax(-1) > 4 / rows.shape[-1]).float().mean() > 0.8


@pytest.mark.parametrize("family", FAMILIES)
def test_token_counts_follow_the_image_size(family: str) -> None:
    model = build(family, layers=1)
    sizes = [(4, 4), (3, 8), (9, 5), (2, 2)]
    found = [
        counts(family, model, make_inputs(family, [Sample([Text(2), Image(h, w)])]))[0]
        for h, w in sizes
    ]
    if family == "llava":
        assert found == [[36]] * 4
    elif family == "internvl":
        assert found == [[16], [16], [16] * 3, [16]]
    elif family in QWEN:
        assert found == [[h * w] for h, w in sizes]
    else:
        assert len({n for (n,) in found}) >= 3


def test_onevision_interpolates_beyond_nine_crops_and_gives_one_crop_to_several_images() -> None:
    model = build("llava_onevision", layers=1)
    big = make_inputs("llava_onevision", [Sample([Text(2), Image(20, 20)])])
    assert big["pixel_values"].shape[1] == 17
    assert counts("llava_onevision", model, big)[0][0] < 16 * 25
    two = make_inputs("llava_onevision", [Sample([Image(20, 20), Image(20, 20)])])
    assert counts("llava_onevision", model, two) == [[26, 26]]


@pytest.mark.parametrize("family", VIDEO)
def test_videos_run_beside_images(family: str) -> None:
    samples = [
        Sample([Text(3), Video(2, 3, 4), Text(4), Image(3, 3), Text(3)]),
        Sample([Video(2, 4, 2), Text(4)]),
    ]
    model, inputs = build(family), make_inputs(family, samples, padding="left")
    (video, image), (second,) = counts(family, model, inputs)
    assert (video, second) == ((24, 16) if family in QWEN else (19, 19))
    assert image == 9 or family not in QWEN
    assert model(**inputs).logits.isfinite().all()
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == 2
    if family == "qwen3_vl":
        places = visual_positions(family, model, inputs)[0][0]
        assert (places.diff() > 1).sum() == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_images_may_touch_and_stand_at_both_ends(family: str) -> None:
    model = build(family, layers=2)
    parts = [Image(4, 4), Text(3), Image(3, 5)]
    inputs = make_inputs(family, [Sample(parts, bare=True)])
    (items,) = visual_positions(family, model, inputs)
    assert items[0][0] == 0
    assert items[-1][-1] == inputs["input_ids"].shape[1] - 1
    assert model(**inputs).logits.isfinite().all()
    touching = make_inputs(family, [Sample([Text(2), Image(4, 4), Image(3, 5), Text(2)])])
    (items,) = visual_positions(family, model, touching)
    assert len(items) == 2
    assert items[1][0] - items[0][-1] == (3 if family in QWEN else 1)
    assert model(**touching).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_alone_has_the_content_it_has_in_the_batch(family: str) -> None:
    model, batch = build(family), make_inputs(family, BATCH, padding="left")
    if family not in QWEN:  # a plain forward counts padding in, and rotary tables are fp32
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(**batch).logits
        for i in range(len(BATCH)):
            single = model(**make_inputs(family, BATCH, only=i)).logits
            assert (together[i, -single.shape[1] :] - single[0]).abs().max() < 1e-9


def test_refusals() -> None:
    with pytest.raises(ValueError, match="padding"):
        make_inputs("llava", BATCH)
    with pytest.raises(ValueError, match="no videos"):
        make_inputs("llava", [Sample([Video()])])
    with pytest.raises(ValueError, match="one image to Qwen"):
        make_inputs("qwen2_vl", [Sample([Image(), Image()], bare=True)])
