"""Features that the caller merged: `inputs_embeds` and no pixels. With token ids beside them what a
method can read is compressed exactly, the rest refused; without, one warning says so.
"""

import warnings
from typing import Any

import pytest
import torch
from tests.laws.cases import (
    CASES,
    FAMILIES,
    GISTS,
    QWEN,
    cases,
    greedy,
    inputs_of,
    logits_of,
    make,
    model_of,
    run,
)
from tests.laws.oracle import oracle_expand, oracle_forward
from tests.laws.test_law09_generation_modes import ORDERED
from tests.laws.test_law10_training import labels_of, training
from tests.tiny import VIDEO, Image, Sample, Text, Video, build, cache_by_prompts, make_inputs
from torch import Tensor

from vispress import compress_model, compressed, remove_compression
from vispress.errors import CompressionStateError, UnsupportedMethodError, UnsupportedModelError
from vispress.kinds import ENCODER_SIGNALS, Signal
from vispress.runtime.attachment import ATTRIBUTE

EXACT = 1e-5
SHAPES = ("image_grid_thw", "video_grid_thw", "image_sizes", "batch_num_images")


def merged(family: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same call with embeddings in place of pixels, as a caller makes them."""
    model, seen = model_of(family), []
    assert ATTRIBUTE not in vars(model.model), "these would be features that a method changed"

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((kwargs["inputs_embeds"].clone(), kwargs.get("position_ids")))

    handle = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    logits_of(model, inputs)
    handle.remove()
    ((embeds, positions),) = seen
    given = {name: inputs[name] for name in SHAPES if name in inputs}
    if family in QWEN:
        given["position_ids"] = positions[-3:]
    return given | {
        "inputs_embeds": embeds,
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
    }


@cache_by_prompts
def batch(family: str) -> dict[str, Any]:
    """The common batch, merged."""
    return merged(family, inputs_of(family))


def without(given: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}


def reads_the_encoder(family: str, method: str) -> bool:
    compressor = make(family, method)
    reads = compressor.signals() & (ENCODER_SIGNALS | {Signal.ENCODER_GROUPS})
    if family != "llava":  # elsewhere pictures have no padding
        reads -= {Signal.PADDING}
    return bool(reads) or compressor.changes_encoder()


MASKED = {"cmai", *GISTS}
"""Methods that mask rows of the prompt itself; the files of their stages have masked models."""
READERS = [case for case in CASES if reads_the_encoder(*case)]
OTHERS = [case for case in CASES if case not in READERS and case[1] not in MASKED]


@pytest.mark.parametrize(("family", "method"), cases("merged features", OTHERS))
def test_embeddings_with_ids_beside_them_are_compressed_exactly(family: str, method: str) -> None:
    """As the masked model, and (without DeepStack, which embeddings lack) as the pixels."""
    model, compressor, given = model_of(family), make(family, method), batch(family)
    found = run(model, given, compressor)
    plain = without(given, "input_ids", *SHAPES)
    with torch.no_grad():
        expected = oracle_forward(model, plain, found.alive, found.positions, found.values)
    expected = oracle_expand(expected, found.alive[-1])
    real = given["attention_mask"].bool()
    assert (found.logits - expected)[real].abs().max() < EXACT
    if family != "qwen3_vl":
        pixels = run(model, inputs_of(family), compressor)
        assert pixels.report.samples == found.report.samples
        assert (found.logits - pixels.logits)[real].abs().max() < EXACT


@pytest.mark.parametrize(
    ("family", "method"), [c for c in READERS if c[0] in ("llava", "qwen2_5_vl")]
)
def test_methods_that_read_the_encoder_are_refused_by_name(family: str, method: str) -> None:
    model, given = model_of(family), batch(family)
    refusal = pytest.raises(UnsupportedMethodError, match=f"{method} needs .*Pass pixel values")
    with compressed(model, make(family, method)), refusal:
        logits_of(model, given)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_without_ids_warn_once_a_model(family: str) -> None:
    model, given = model_of(family), without(batch(family), "input_ids", *SHAPES)
    expected = logits_of(model, given)
    with compressed(model, "divprune", keep_ratio=0.4):
        with pytest.warns(UserWarning, match="nothing is compressed.*Give input_ids beside"):
            assert torch.equal(logits_of(model, given), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logits_of(model, given)
    other = build(family)
    compress_model(other, "divprune", keep_ratio=0.4)
    with pytest.warns(UserWarning, match="nothing is compressed"):
        logits_of(other, given)
    remove_compression(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits_of(other, given)


@pytest.mark.parametrize("beams", [1, 2] if ORDERED else [1])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_what_it_gives_for_pixels(family: str, beams: int) -> None:
    """It keeps the ids for itself, and repeats what it is given for beams."""
    model = model_of(family)
    given = without(batch(family), *(() if family in QWEN else ("position_ids",)))
    if family in QWEN:
        given["mm_token_type_ids"] = inputs_of(family)["mm_token_type_ids"]
        del given["position_ids"]
    with compressed(model, [make(family, "divprune"), make(family, "fastv")]) as report:
        found = greedy(model, given | {"num_beams": beams})[0]
        kept = report.samples
        if family == "qwen3_vl":
            assert report.mean_keep_ratio < 0.4
            return
        expected = greedy(model, inputs_of(family) | {"num_beams": beams})[0]
        assert kept == report.samples
    prompt = given["input_ids"].shape[1]
    assert torch.equal(found[:, -3:], expected[:, prompt:])


@pytest.mark.parametrize("family", QWEN)
def test_token_types_tell_where_the_images_stand(family: str) -> None:
    model, given = model_of(family), batch(family)
    types = {"mm_token_type_ids": inputs_of(family)["mm_token_type_ids"]}
    with compressed(model, "divprune", keep_ratio=0.4):
        expected = logits_of(model, given)
        assert torch.equal(logits_of(model, without(given, "input_ids") | types), expected)


@pytest.mark.parametrize("family", VIDEO)
def test_videos_are_told_apart_by_their_grids_or_refused(family: str) -> None:
    samples = [Sample([Text(3), Video(3, 4, 4), Text(6)])]
    model, given = model_of(family), merged(family, make_inputs(family, samples))
    with compressed(model, "divprune", keep_ratio=0.4) as report:
        if family == "llava_onevision":
            with pytest.raises(UnsupportedModelError, match=r"videos merged.*pass pixel values"):
                logits_of(model, given)
            return
        logits_of(model, given)
        ((video,),) = (sample.images for sample in report.samples)
        assert (video.modality, video.grid) == ("video", (3, 4, 4))


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", *QWEN])
def test_sizes_that_are_missing_are_asked_for_by_name(family: str) -> None:
    model, given = model_of(family), without(batch(family), *SHAPES)
    name = "image_grid_thw" if family in QWEN else "image_sizes"
    refusal = pytest.raises(UnsupportedModelError, match=f"pass {name} beside")
    with compressed(model, "uniform", keep_ratio=0.4), refusal:
        logits_of(model, given)
    if family in QWEN:  # marks of vision tell images apart, and this method reads no grid
        with compressed(model, "divprune", keep_ratio=0.4):
            found = logits_of(model, given)
            assert torch.equal(found, logits_of(model, batch(family)))


def test_placeholders_that_fit_no_image_are_refused() -> None:
    given = dict(batch("llava"))
    ids: Tensor = given["input_ids"].clone()
    ids[0, -1] = ids[0].max()  # one placeholder more
    refusal: Any = pytest.raises(UnsupportedModelError, match="is no number of images of 36 tokens")
    with compressed(model_of("llava"), "divprune", keep_ratio=0.4), refusal:
        logits_of(model_of("llava"), given | {"input_ids": ids})
    given = dict(batch("qwen2_vl"))
    given["image_grid_thw"] = given["image_grid_thw"][:1]
    refusal = pytest.raises(CompressionStateError, match="placeholders beside inputs_embeds do not")
    with compressed(model_of("qwen2_vl"), "divprune", keep_ratio=0.4), refusal:
        logits_of(model_of("qwen2_vl"), given)


def test_text_beside_embeddings_is_the_models_own_affair() -> None:
    """Transformers takes one of the two, and there is nothing to compress."""
    model, ids = model_of("llava"), torch.full((1, 6), 9)
    embeds = model.get_input_embeddings()(ids).detach()
    with compressed(model, "divprune", keep_ratio=0.4):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(input_ids=ids, inputs_embeds=embeds)
        expected = logits_of(model, {"input_ids": ids})
        with pytest.warns(UserWarning, match="nothing is compressed"):
            assert torch.equal(logits_of(model, {"inputs_embeds": embeds}), expected)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "internvl"])
def test_training_on_embeddings_gives_the_loss_of_pixels(family: str) -> None:
    model, inputs, given = model_of(family), inputs_of(family), batch(family)
    labels = labels_of(inputs)
    embeds = given["inputs_embeds"].clone().requires_grad_()
    with training(model), compressed(model, make(family, "pyramiddrop")) as report:
        expected = model(**inputs, labels=labels).loss
        kept = report.samples
        found = model(**(given | {"inputs_embeds": embeds}), labels=labels).loss
        assert kept == report.samples
        (gradient,) = torch.autograd.grad(found, [embeds])
    assert abs(found - expected) < 1e-9
    assert gradient.isfinite().all()


def test_an_image_of_one_size_alone_is_counted_by_its_runs() -> None:
    """Two pictures side by side are two."""
    inputs = make_inputs("llava", [Sample([Text(3), Image(), Image(), Text(4)])])
    given = merged("llava", inputs)
    with compressed(model_of("llava"), "divprune", num_tokens=5) as report:
        logits_of(model_of("llava"), given)
        assert [image.num_kept for image in report.samples[0].images] == [5, 5]
