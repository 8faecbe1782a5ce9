"""Law 5: no text token is ever dropped, and a prompt without images is untouched."""

from typing import Any

import pytest
import torch
from tests.laws.cases import DROPPING, FAMILIES, cases, greedy, logits_of, model_of, settings
from tests.tiny import QWEN, VIDEO, Image, Sample, Text, Video, cache_by_prompts, make_inputs
from tests.tiny_models import IMAGE_ID, VIDEO_ID
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from vispress import compressed, compression_report
from vispress.errors import BudgetError, CompressionStateError
from vispress.methods import DivPrune, FastV, TransPrune
from vispress.runtime.kv_cache.hf_compat import CACHE, cache_of
from vispress.runtime.kv_cache.slots import CompressedLayerMixin

LAYOUTS = {
    "mixed": [
        Sample([Image(4, 4), Text(6)], bare=True),  # an image at position 0
        Sample([Text(6), Image(4, 6)], bare=True),  # nothing behind the image
        Sample([Text(1), Image(4, 4), Text(1), Image(6, 4), Text(1)]),
        Sample([Text(9)]),
        Sample([Image(4, 4), Image(4, 4), Image(4, 6), Text(2)]),  # side by side
    ],
    "one long": [Sample([Text(30)]), Sample([Text(1), Image(4, 4), Text(1)])],
    "video": [Sample([Text(3), Video(2, 4, 4), Text(4)]), Sample([Text(5), Video(2, 2, 4)])],
}


@cache_by_prompts
def prompts(family: str, padding: str, layout: str = "mixed") -> dict[str, Any]:
    return make_inputs(family, LAYOUTS[layout], padding=padding)


def text_of(inputs: dict[str, Any]) -> Tensor:
    """`[B, L]`: real tokens that are no placeholders (marks around an image are text)."""
    ids = inputs["input_ids"]
    return inputs["attention_mask"].bool() & (ids != IMAGE_ID) & (ids != VIDEO_ID)


def assert_text_survives(model: Any, inputs: dict[str, Any]) -> None:
    report = compression_report(model)
    text, real = text_of(inputs), inputs["attention_mask"].bool()
    dropped = 0
    for layer in range(report.num_layers):
        alive = report.alive(layer)
        assert alive[text].all(), f"text dropped before layer {layer}"
        assert not alive[~real].any(), f"padding alive in layer {layer}"
        dropped += int((real & ~alive).sum())
    assert dropped > 0


@pytest.mark.parametrize(
    ("family", "method", "padding"), cases(5, DROPPING, turning=("left", "right"))
)
def test_text_survives_wherever_images_stand(family: str, method: str, padding: str) -> None:
    model, inputs = model_of(family), prompts(family, padding)
    with compressed(model, method, **settings(family, method)):
        logits = logits_of(model, inputs)
        assert logits.isfinite().all()
        assert_text_survives(model, inputs)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_survives_a_chain_and_a_much_longer_neighbour(family: str, padding: str) -> None:
    model, inputs = model_of(family), prompts(family, padding, "one long")
    chain = [DivPrune(num_tokens=6), FastV(num_tokens=3, layer=1), TransPrune(num_tokens=1)]
    with compressed(model, chain) as report:
        logits_of(model, inputs)
        assert_text_survives(model, inputs)
        assert [i.num_kept for s in report.samples for i in s.images] == [1]


@pytest.mark.parametrize("family", VIDEO)
def test_text_around_and_between_video_frames_survives(family: str) -> None:
    """Qwen3-VL has text (timestamps) between the frames of one video."""
    model, inputs = model_of(family), prompts(family, "left", "video")
    for method in ("fastv", "divprune", "no_image", "vtw"):
        with compressed(model, method, **settings(family, method)):
            logits_of(model, inputs)
            assert_text_survives(model, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_that_generate_adds_is_seen_by_the_next(family: str) -> None:
    """Generated tokens are text, too: the cache keeps all of them, in every layer."""
    model, inputs = model_of(family), prompts(family, "left")
    start = inputs["input_ids"].shape[1]
    for method in ("fastv", "no_image", "vtw"):
        cache = DynamicCache()
        with compressed(model, method, **settings(family, method)):
            model.generate(
                **inputs, **{CACHE: cache}, max_new_tokens=4, min_new_tokens=4, do_sample=False
            )
        assert [layer.get_seq_length() for layer in cache.layers] == [start + 3] * 6
        for layer in cache.layers:
            if not isinstance(layer, CompressedLayerMixin):  # nothing was dropped so early
                assert layer.keys.shape[2] == start + 3
                continue
            positions, valid = layer.slots.positions, layer.slots.valid
            assert positions.shape[1] == layer.keys.shape[2] < start + 3
            assert positions[:, -3:].tolist() == [[start, start + 1, start + 2]] * 5
            held = torch.zeros(5, start + 3, dtype=torch.bool)
            for row, places in enumerate(positions):
                held[row, places if valid is None else places[valid[row]]] = True
            assert held[:, :start][text_of(inputs)].all()


@pytest.mark.parametrize(("family", "method"), cases("text alone"))
def test_a_prompt_without_images_is_untouched(family: str, method: str) -> None:
    model = model_of(family)
    inputs = make_inputs(family, [Sample([Text(7)]), Sample([Text(4)])], padding="left")
    expected, (tokens, steps) = logits_of(model, inputs), greedy(model, inputs)
    with compressed(model, method, **settings(family, method)):
        with torch.no_grad():
            out = model(**inputs)
        assert torch.equal(out.logits, expected)
        assert type(cache_of(out)) is DynamicCache
        assert {type(layer) for layer in cache_of(out).layers} == {DynamicLayer}
        got_tokens, got_steps = greedy(model, inputs)
        assert torch.equal(got_tokens, tokens)
        assert torch.equal(got_steps, steps)
        with pytest.raises(CompressionStateError, match="no visual tokens"):
            compression_report(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_of_a_prompt_without_images_is_untouched(family: str) -> None:
    model = model_of(family)
    inputs = make_inputs(family, [Sample([Text(7)])])
    with compressed(model, "fastv", keep_ratio=0.4):
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=16)
        model.generate(**inputs, **{CACHE: cache}, max_new_tokens=3, do_sample=False)
    assert {type(layer) for layer in cache.layers} == {StaticLayer}
    assert {layer.keys.shape[2] for layer in cache.layers} == {16}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_prompt_after_one_with_images_is_untouched(family: str) -> None:
    """Nothing of the first prompt reaches the second, not even its report."""
    model = model_of(family)
    text = make_inputs(family, [Sample([Text(7)])])
    expected = logits_of(model, text)
    with compressed(model, "fastv", keep_ratio=0.4) as report:
        logits_of(model, prompts(family, "left"))
        assert report.turn == 1
        assert torch.equal(logits_of(model, text), expected)
        with pytest.raises(
            CompressionStateError, match=r"turn 1 of .* 7 tokens.* no visual tokens"
        ):
            _ = report.turn


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in QWEN])
def test_a_prompt_of_nothing_but_an_image_keeps_some_of_it_or_is_refused(family: str) -> None:
    model = model_of(family)
    inputs = make_inputs(family, [Sample([Image(4, 4)], bare=True)])
    with compressed(model, "random", num_tokens=2) as report:
        assert logits_of(model, inputs).isfinite().all()
        assert report.samples[0].images[0].num_kept == 2
    for method in ("no_image", "vtw"):
        with compressed(model, method), pytest.raises(BudgetError, match="nothing is left"):
            logits_of(model, inputs)


def test_a_dropped_text_token_is_noticed() -> None:
    model, inputs = model_of("llava"), prompts("llava", "left")
    with compressed(model, "fastv", keep_ratio=0.4):
        logits_of(model, inputs)
        report = compression_report(model)
        place = tuple(text_of(inputs).nonzero()[0].tolist())
        report.alive(report.num_layers - 1)[place] = False
        with pytest.raises(AssertionError, match="text dropped"):
            assert_text_survives(model, inputs)
