"""Pooling between the layers of the vision encoder: what it computes, what it refuses."""

from typing import Any

import pytest
import torch
from tests.laws.cases import FAMILIES, fits, inputs_of, logits_of, make, model_of
from tests.laws.slow_pvc import SlowPVC
from tests.laws.slow_pvc_joined import SlowJoined, at
from tests.laws.test_law10_training import checkpointing, loss_of, training
from tests.laws.test_law17_parameters import compressed_anew
from tests.tiny import Image, Sample, Text, Video, build, make_inputs
from torch import Tensor

from vispress import compress_model, compressed, compression_report, remove_compression
from vispress.adapters.base import find_adapter
from vispress.errors import CompressionStateError, ConfigError, UnsupportedMethodError
from vispress.methods import PVC, DivPrune, FasterVLM, FastV, ToMe
from vispress.runtime.modules import MODULES

EXACT = 1e-10
CLOSE = 3e-5
"""The LLM's norms and rotations are fp32 in transformers."""
# crops of 4 x 4 patches: unpadding leaves odd rows and columns of some
SAMPLES = (
    Sample([Text(4), Image(4, 4), Text(3), Image(6, 4), Text(5)]),
    Sample([Text(3)]),
    Sample([Text(2), Image(3, 6), Text(6)]),
)
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}
CASES = [("llava", (1,)), ("llava", (3,)), ("llava_next", (2,)), ("llava_next", (1, 3))]


def case(family: str, after: tuple[int, ...], **options: Any) -> tuple[Any, SlowPVC, Any]:
    """A compressed model with drawn pools, all in fp64; the same model written out; a batch."""
    model = compressed_anew(family, PVC(after=after), **options).double()
    plain = build(family)
    module = model.get_submodule(f"model.{MODULES}.0")
    with torch.no_grad():  # softmaxes that are no maxima
        for parameter in module.parameters():
            parameter.mul_(0.3)
    slow = SlowPVC(family, plain, dict(module.named_parameters()), after)
    return model, slow, make_inputs(family, SAMPLES, padding="left")


def assert_same_logits(model: Any, slow: SlowPVC, inputs: Any) -> None:
    got = logits_of(model, inputs)
    with torch.no_grad():
        expected = slow.logits(inputs)
    for row, (left, wanted) in zip(got, expected, strict=True):
        assert (row[left] - wanted).abs().max() < CLOSE


@pytest.mark.parametrize(("family", "after"), CASES)
def test_it_is_the_encoder_written_out_and_a_shorter_prompt(
    family: str, after: tuple[int, ...]
) -> None:
    model, slow, inputs = case(family, after)
    assert_same_logits(model, slow, inputs)
    images = [image for s in compression_report(model).samples for image in s.images]
    for image, (features, places) in zip(images, slow.images(inputs), strict=True):
        assert list(image.placements[-1].kept) == places
        assert image.num_kept == len(features)
        assert image.encoder is not None
        whole = image.encoder.num_tokens
        assert image.encoder.per_layer == tuple(
            whole // 4 ** sum(at <= layer for at in after) for layer in (1, 2, 3)
        )


@pytest.mark.parametrize(("family", "after"), CASES)
def test_gradients_are_those_of_the_encoder_written_out(
    family: str, after: tuple[int, ...]
) -> None:
    """Of pools, pixels and every parameter of the model, by a loss of what is left."""
    model, slow, inputs = case(family, after)
    pixels = inputs["pixel_values"].requires_grad_()
    own = dict(model.get_submodule(f"model.{MODULES}.0").named_parameters())
    theirs, ours = dict(slow.model.named_parameters()), dict(model.named_parameters())
    of_slow = {"pixels": pixels} | own | theirs
    of_model = {"pixels": pixels} | own | {name: ours[name] for name in theirs}
    images = slow.images(inputs)
    call = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    features = model.model.get_image_features(**call).pooler_output
    kept = [own[places] for own, (_, places) in zip(features, images, strict=True)]
    assert_same_gradients(kept, [x for x, _ in images], of_model, of_slow, EXACT)
    expected = slow.logits(inputs)
    rows = zip(model(**inputs).logits, expected, strict=True)
    left = [row[places] for row, (places, _) in rows]
    found = assert_same_gradients(left, [x for _, x in expected], of_model, of_slow, CLOSE)
    for name in ("pixels", *own):  # a softmax does not see what is added to all of its logits
        assert bool(found[name].abs().max() > 1e-3) != name.endswith("logits.bias"), name


JOINED = [("internvl", (2,)), ("internvl", (1, 3)), ("qwen2_vl", (3,)), ("qwen3_vl", (2,))]
# deepest layer 3 is behind both taps of DeepStack
JOINED += [("qwen2_vl", (1, 4)), ("qwen3_vl", (1, 2))]
TILES = (Sample([Text(4), Image(4, 8), Text(3)]), Sample([Text(2), Image(8, 4), Image(4, 4)]))


@pytest.mark.parametrize(("family", "after"), JOINED)
def test_where_four_patches_make_a_token_they_are_a_window(
    family: str, after: tuple[int, ...]
) -> None:
    """Features, DeepStack's too, and gradients; four windows make a token again."""
    model, of_plain, _ = case(family, after)
    slow = SlowJoined(family, of_plain.model, of_plain.pools, after)
    inputs = make_inputs(family, TILES, padding="left")
    pixels = inputs["pixel_values"].requires_grad_()
    names = ("pixel_values", "image_grid_thw")
    output = model.model.get_image_features(**{n: inputs[n] for n in names if n in inputs})
    frames = slow.frames(inputs)
    grids = find_adapter(model).picture_grids("image", inputs) or [(1, 4, 4)] * len(frames)
    places = [slow.kept(h, w) for _, h, w in grids]
    found, expected = at(output.pooler_output, places), [x for x, _ in frames]
    for number, deep in enumerate(getattr(output, "deepstack_features", None) or ()):
        sizes = [h * w for _, h, w in grids]
        found += at(deep.split(sizes) if isinstance(deep, Tensor) else deep, places)
        expected += [taps[number] for _, taps in frames]
    assert len(found) == len(frames) * (3 if family == "qwen3_vl" else 1)
    own = dict(model.get_submodule(f"model.{MODULES}.0").named_parameters())
    theirs, ours = dict(slow.model.named_parameters()), dict(model.named_parameters())
    of_slow = {"pixels": pixels} | own | theirs
    of_model = {"pixels": pixels} | own | {name: ours[name] for name in theirs}
    tolerance = EXACT if family == "internvl" else 1e-7  # rotations are fp32
    gradients = assert_same_gradients(found, expected, of_model, of_slow, tolerance)
    assert all(gradients[n].any() for n in ("pixels", *own) if not n.endswith("logits.bias"))


def test_videos_are_pooled_frame_by_frame() -> None:
    model, inputs = (
        model_of("qwen2_vl"),
        make_inputs("qwen2_vl", [Sample([Text(3), Video(2, 4, 6)])]),
    )
    with compressed(model, make("qwen2_vl", "pvc")) as report:
        logits_of(model, inputs)
        (video,) = report.samples[0].images
    frame = [0, 2, 4, 12, 14, 16]
    assert list(video.kept) == [*frame, *(24 + place for place in frame)]
    assert video.encoder is not None
    assert (video.encoder.num_tokens, video.encoder.num_left) == (48, 12)


def assert_same_gradients(
    found: list[Tensor],
    expected: list[Tensor],
    of_found: dict[str, Tensor],
    of_expected: dict[str, Tensor],
    tolerance: float,
) -> dict[str, Tensor]:
    """Values, and gradients of random sums of them."""
    generator, losses = torch.Generator().manual_seed(2), []
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in expected]
    for values, of in ((found, of_found), (expected, of_expected)):
        loss = sum((w * x).sum() for w, x in zip(weights, values, strict=True))
        losses.append(grads(loss, list(of.values())))
    for got, right in zip(found, expected, strict=True):
        assert (got - right).abs().max() < tolerance
    for name, got, right in zip(of_found, *losses, strict=True):
        scale = max(1.0, float(right.abs().max()))
        assert (got - right).abs().max() < tolerance * scale, name
    return dict(zip(of_found, losses[0], strict=True))


def grads(loss: Any, of: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of, allow_unused=True, materialize_grads=True)


def test_pools_change_what_the_encoder_gives() -> None:
    model, slow, inputs = case("llava", (1,))
    drawn = logits_of(model, inputs)
    with torch.no_grad():
        slow.pools["0.logits.weight"].zero_()
    assert_same_logits(model, slow, inputs)  # average pooling
    assert (logits_of(model, inputs) - drawn).abs().max() > 1


def test_an_encoder_without_cls_pools() -> None:
    vision = SIGLIP | {"image_size": 24}
    model = build("llava", vision=vision)
    model.config.vision_feature_select_strategy = "full"
    plain = build("llava", vision=vision)
    compress_model(model, PVC(after=(2,))).double()
    module = model.get_submodule(f"model.{MODULES}.0")
    slow = SlowPVC("llava", plain, dict(module.named_parameters()), (2,))
    plain.config.vision_feature_select_strategy = "full"
    assert not find_adapter(model).has_cls
    assert_same_logits(model, slow, make_inputs("llava", SAMPLES, padding="left"))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_any_attention_of_the_encoder_will_do(attn: str) -> None:
    inputs, method = inputs_of("llava"), make("llava", "pvc")
    with compressed(model_of("llava"), method):
        expected = logits_of(model_of("llava"), inputs)
    with compressed(model_of("llava", attn=attn), method):
        found = logits_of(model_of("llava", attn=attn), inputs)
    assert (found - expected)[inputs["attention_mask"].bool()].abs().max() < CLOSE


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_pool_are_not_checkpointed_and_checkpointed_again_afterwards(
    reentrant: bool,
) -> None:
    model, inputs = build("llava"), inputs_of("llava")
    layer, flags = find_adapter(model).encoder_blocks()[0].layer, []
    hook = layer.register_forward_pre_hook(lambda own, _: flags.append(own.gradient_checkpointing))
    with training(model), checkpointing(model, reentrant=reentrant):
        with compressed(model, make("llava", "pvc")):
            loss_of(model, inputs).backward()
        loss_of(model, inputs).backward()
    hook.remove()
    # older transformers run hooks again with the layer in the backward pass
    assert flags[:2] == [False, True]
    assert all(flags[1:])


def test_layers_whose_hooks_do_not_run_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vispress.runtime.stages.encoder.current_merge", lambda: None)
    with (
        compressed(model_of("llava"), make("llava", "pvc")),
        pytest.raises(CompressionStateError, match=r"compiled.*leave pvc out"),
    ):
        logits_of(model_of("llava"), inputs_of("llava"))


def test_a_chain_behind_it_sees_one_token_a_window() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    chain = [make("llava", "pvc"), DivPrune(num_tokens=5), FastV(num_tokens=2, layer=2)]
    with compressed(model, chain) as report:
        logits_of(model, inputs)
        for sample in report.samples:
            for image in sample.images:
                assert [p.num_kept for p in image.placements] == [9, 5, 2]
                assert set(image.placements[-1].kept) <= {
                    12 * i + 2 * j for i in range(3) for j in range(3)
                }


# --- what is refused


FITTING = ["llava", "llava_next", "internvl", "qwen2_vl", "qwen3_vl"]
REFUSED = {
    "llava_onevision": "what it gives is resized",
    "qwen2_5_vl": "encoder of qwen2_5_vl attends in windows",
}


@pytest.mark.refusal
@pytest.mark.parametrize("family", REFUSED)
def test_encoders_without_whole_rasters_are_refused(family: str) -> None:
    model = model_of(family)
    with pytest.raises(UnsupportedMethodError, match=REFUSED[family]) as told:
        compress_model(model, PVC(after=(1,)))
    assert f"({', '.join(FITTING)})" in str(told.value)
    assert not any(MODULES in name for name, _ in model.named_modules())
    with pytest.raises(UnsupportedMethodError, match="Methods that work") as told:
        compress_model(model, "fastervlm", keep_ratio=0.5)
    assert "tome" in str(told.value)
    assert "pvc" not in str(told.value)


def test_laws_meet_the_families_that_are_left() -> None:
    assert {f for f in FAMILIES if fits(f, "pvc")} == set(FITTING) == {*FAMILIES} - {*REFUSED}


@pytest.mark.refusal
def test_a_grid_that_cannot_be_halved_is_refused_when_compressed() -> None:
    model = model_of("llava")
    match = "2 x 2 patches 2 times, so rows and columns of tokens must be multiples of 4; 6 x 6"
    with pytest.raises(UnsupportedMethodError, match=match):
        compress_model(model, PVC(after=(1, 2)))
    with pytest.raises(ConfigError, match=r"after=\(4,\) .* the vision encoder has 3"):
        compress_model(model, PVC(after=(4,)))
    assert not any(MODULES in name for name, _ in model.named_modules())


@pytest.mark.refusal
def test_a_picture_that_cannot_be_halved_is_refused_and_leaves_nothing_behind() -> None:
    model = build("llava")
    compress_model(model, PVC(after=(1,)))
    pixels = torch.randn(1, 3, 24, 20, dtype=torch.float64)
    with pytest.raises(UnsupportedMethodError, match="6 x 5 of this llava model"):
        model.model.get_image_features(pixels, interpolate_pos_encoding=True)
    found = model.model.get_image_features(
        torch.cat([pixels, pixels], dim=3)[..., :32], interpolate_pos_encoding=True
    )
    (features,) = found.pooler_output
    rows = features.view(6, 8, -1)
    assert torch.equal(rows[::2, ::2], rows[1::2, 1::2])
    remove_compression(model)
    assert logits_of(model, inputs_of("llava")).equal(
        logits_of(model_of("llava"), inputs_of("llava"))
    )


@pytest.mark.refusal
def test_a_picture_of_odd_rows_among_others_is_refused_by_its_size() -> None:
    model, samples = model_of("qwen2_vl"), [Sample([Text(2), Image(4, 4), Text(1), Image(4, 5)])]
    with (
        compressed(model, make("qwen2_vl", "pvc")),
        pytest.raises(UnsupportedMethodError, match="of 2; 4 x 5 of this qwen2_vl model are not"),
    ):
        logits_of(model, make_inputs("qwen2_vl", samples))


@pytest.mark.refusal
def test_it_comes_first_and_nobody_reads_the_encoder_beside_it() -> None:
    model, pvc = model_of("llava"), PVC(after=(1,))
    with pytest.raises(ConfigError, match=r"divprune before it .* order the chain"):
        compress_model(model, [DivPrune(keep_ratio=0.5), pvc])
    for chain in ([pvc, ToMe(keep_ratio=0.5)], [ToMe(keep_ratio=1.0), pvc]):
        with pytest.raises(ConfigError, match="order the chain"):
            compress_model(model, chain)
    with pytest.raises(
        UnsupportedMethodError, match=r"fastervlm reads cls_attention .* pvc merges"
    ):
        compress_model(model, [pvc, FasterVLM(keep_ratio=0.5)])


@pytest.mark.refusal
def test_features_that_others_made_are_refused() -> None:
    """Nothing was pooled in them."""
    model, inputs = model_of("llava"), dict(inputs_of("llava"))
    inputs.pop("pixel_values")
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    with (
        compressed(model, make("llava", "pvc")),
        pytest.raises(UnsupportedMethodError, match="pvc needs tokens inside of the vision enc"),
    ):
        logits_of(model, inputs)
