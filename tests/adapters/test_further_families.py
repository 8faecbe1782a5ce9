"""Adapters of newer families: where values of patches go, what is refused, and audio among text."""

from typing import Any

import pytest
import torch
from tests.adapters.test_adapters import IMAGES, VIDEOS, Seen, newlines
from tests.families import TABLE
from tests.families.qwen_omni import AUDIO_END, AUDIO_ID, AUDIO_START
from tests.laws.cases import inputs_of, make, model_of, real_positions, run
from tests.laws.oracle import oracle_expand, oracle_forward
from tests.laws.windows import expected_logits
from tests.tiny import build
from tests.tiny_models import WINDOWED

from vispress import compress_model, unsupported_methods
from vispress.adapters.base import find_adapter
from vispress.errors import UnsupportedModelError

OMNI = tuple(name for name in ("qwen2_5_omni", "qwen3_omni_moe") if name in TABLE)
CASES = [
    *((name, "image") for name in ("vipllava", "cohere2_vision", "aya_vision")),
    *((name, kind) for name in ("llava_next_video", *OMNI) for kind in ("image", "video")),
]
THERE = [case for case in CASES if case[0] in TABLE]
"""Of those that this transformers has."""


@pytest.mark.parametrize(("family", "modality"), THERE)
def test_projected_inputs_are_the_features(family: str, modality: str) -> None:
    seen = Seen(family, modality, VIDEOS if modality == "video" else IMAGES)
    rows = seen.adapter.projector_inputs(modality, seen.raw, seen.call)
    packed = seen.adapter.pack(modality, rows, seen.call)
    weights = seen.adapter.two_layer()
    assert (weights is None) == (family in ("cohere2_vision", "aya_vision"))
    for inputs, own, layout in zip(packed, seen.features, seen.layouts, strict=True):
        kept = ~newlines(layout, len(own))
        assert kept.any()
        with torch.no_grad():
            mine = seen.adapter.project(seen.adapter.projector, inputs[kept][1:])
        assert (mine - own[kept][1:]).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("family", "modality", "side"),
    [
        (family, modality, 4 if modality == "video" else 8)
        for family, modality in THERE
        if (family, modality) == ("llava_next_video", "video")
        or family.endswith("a_vision")
        or family == "cohere2_vision"
    ],
)
def test_tokens_lie_in_the_middle_of_their_patches(family: str, modality: str, side: int) -> None:
    seen = Seen(family, modality, VIDEOS if modality == "video" else IMAGES)
    count = len(seen.raw)
    place = torch.cartesian_prod(*map(torch.arange, (count, side, side))).double()
    packed = seen.adapter.pack(modality, place.view(count, side**2, 3), seen.call)
    for mine, (grid, _) in zip(packed, seen.layouts, strict=True):
        assert grid is not None
        wanted = torch.cartesian_prod(*map(torch.arange, grid)).double()
        wanted = wanted * torch.tensor([1, 2, 2]) + torch.tensor([0, 0.5, 0.5])
        wanted[:, 0] += mine[0, 0]
        assert torch.allclose(mine, wanted)


@pytest.mark.skipif("vipllava" not in TABLE, reason="needs transformers 5.24")
def test_vipllava_reads_the_deepest_of_its_layers_and_merges_in_none() -> None:
    model = build("vipllava", layers=1)
    adapter = find_adapter(model)
    assert adapter.feature_layer() == 3
    assert "tome" in unsupported_methods(model)
    model.model.config.vision_feature_layer = 2
    assert adapter.feature_layer() == 1
    assert len(adapter.encoder_blocks()) == 2


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("vipllava", {"vision_feature_layer": [-2, -5]}, {}, "valid are -4 to -1 and 1 to 4"),
    ("vipllava", {}, {"model_type": "siglip_vision_model"}, "first token; CLIP towers"),
    ("cohere2_vision", {"downsample_factor": 3}, {}, "downsample_factor=3 does not divide the 8"),
    ("cohere2_vision", {}, {"model_type": "clip_vision_model"}, "SigLIP towers are supported"),
]


@pytest.mark.parametrize(
    ("family", "settings", "vision", "message"), [case for case in REFUSED if case[0] in TABLE]
)
def test_settings_that_would_go_wrong_are_refused(
    family: str, settings: dict[str, Any], vision: dict[str, Any], message: str
) -> None:
    model = build(family, layers=1, vision=vision)
    for name, value in settings.items():
        setattr(model.model.config, name, value)
    with pytest.raises(UnsupportedModelError, match=message):
        compress_model(model, "uniform", keep_ratio=0.5)


@pytest.mark.parametrize("family", OMNI)
def test_audio_is_text(family: str) -> None:
    """Its tokens stay, and a method's choice among the image's is that of the masked model."""
    model, inputs = model_of(family), dict(inputs_of(family))
    frames = 16
    sound = torch.randn(1, 16, frames, generator=torch.Generator().manual_seed(0)).double()
    base = model.model
    heard = {"input_features": sound, "feature_attention_mask": torch.ones(1, frames).long()}
    with torch.no_grad():
        count = len(base.get_audio_features(**heard, return_dict=True).last_hidden_state)
    audio = torch.tensor([[AUDIO_START, *[AUDIO_ID] * count, AUDIO_END]])
    row = inputs["attention_mask"][0].bool()
    inputs["input_ids"] = torch.cat([audio, inputs["input_ids"][:1, row]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["image_grid_thw"] = inputs["image_grid_thw"][:1]
    inputs["pixel_values"] = inputs["pixel_values"][: int(inputs["image_grid_thw"].prod())]
    inputs |= heard
    result = run(model, inputs, make(family, "fastv"))
    for alive in result.alive:
        assert alive[0, : count + 2].all()
    assert not result.alive[-1].all()
    expected = oracle_expand(
        oracle_forward(model, inputs, result.alive, result.positions, result.values),
        result.alive[-1],
    )
    assert (result.logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_internvl_over_gpt_oss_equals_the_masked_model(method: str) -> None:
    """Its sinks and windows are eager and in fp32."""
    text = WINDOWED["gpt_oss"] | {"sliding_window": 20}
    model = build("internvl", dtype=torch.float32, attn="eager", text=text)
    inputs = real_positions("internvl", inputs_of("internvl", "right", torch.float32))
    result = run(model, inputs, make("internvl", method))
    difference = (result.logits - expected_logits(model, result, inputs)).abs()
    assert difference[inputs["attention_mask"].bool()].max() < 1e-4
