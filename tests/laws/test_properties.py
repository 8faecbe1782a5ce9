"""Random prompts, budgets, methods: text survives, budgets are exact, logits are the oracle's."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.laws.cases import DROPS, FAMILIES, NO_BUDGET, model_of, run
from tests.laws.cases import settings as settings_of
from tests.laws.oracle import oracle_expand, oracle_forward
from tests.laws.test_law06_budget import asked, assert_met
from tests.tiny import QWEN, VIDEO, Image, Part, Sample, Text, Video, make_inputs
from tests.tiny_models import IMAGE_ID, VIDEO_ID

from vispress.config import make_compressor
from vispress.methods.base import Compressor
from vispress.registry import get_method

FEW = settings(
    max_examples=10,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SIZES = ((2, 2), (4, 4), (4, 6), (6, 4))
DRAWN = tuple(name for name in DROPS if get_method(name).needs is None)
SCHEDULES = ("pyramiddrop", "transprune")
MEANS = ("adsc", "layerwise", "sparsevlm", "sparsevlm_plus")
"""Methods that read a ratio as a mean over layers, which six layers cannot make small."""

images = st.sampled_from([Image(h, w) for h, w in SIZES])
texts = st.integers(1, 7).map(Text)


@st.composite
def prompts(draw: st.DrawFn, family: str) -> Sample:
    """Text, images and perhaps a video in any order, with at least one text token."""
    visual = st.one_of(images, st.just(Video(2, 4, 4))) if family in VIDEO else images
    parts: list[Part] = draw(st.lists(st.one_of(texts, visual), min_size=0, max_size=4))
    parts.insert(draw(st.integers(0, len(parts))), draw(texts))
    # adjacent bare images are one to Qwen models
    bare = family not in QWEN and draw(st.booleans())
    return Sample(parts, bare=bare)


@st.composite
def batches(draw: st.DrawFn, family: str) -> dict[str, Any]:
    samples = draw(st.lists(prompts(family), min_size=1, max_size=3))
    if not any(isinstance(p, Image | Video) for s in samples for p in s.parts):
        samples.append(Sample([Text(2), Image(4, 4), Text(2)]))
    padding = draw(st.sampled_from(["left", "right"]))
    return make_inputs(family, samples, padding=padding, seed=draw(st.integers(0, 3)))


@st.composite
def compressors(draw: st.DrawFn, family: str) -> Compressor:
    name = draw(st.sampled_from(DRAWN))
    options = {k: v for k, v in settings_of(family, name).items() if k != "keep_ratio"}
    if name in NO_BUDGET:
        return make_compressor(name)
    if draw(st.booleans()):
        return make_compressor(name, **options, num_tokens=draw(st.integers(1, 40)))
    if name in SCHEDULES:
        ratios = sorted(draw(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=2)), reverse=True)
        layers = tuple(sorted(draw(st.sets(st.integers(1, 5), min_size=2, max_size=2))))
        return make_compressor(name, **options, layers=layers, ratios=tuple(ratios))
    least = 0.4 if name in MEANS else 0.01
    return make_compressor(name, **options, keep_ratio=draw(st.floats(least, 1.0)))


@pytest.mark.slow(cases=3)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_prompt_keeps_its_text_and_its_budget_and_equals_the_masked_model(family: str) -> None:
    model = model_of(family)

    @FEW
    @given(inputs=batches(family), method=compressors(family))
    def check(inputs: dict[str, Any], method: Compressor) -> None:
        result = run(model, inputs, method)
        ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
        text = real & (ids != IMAGE_ID) & (ids != VIDEO_ID)
        for alive in result.alive:
            assert alive[text].all()
            assert not alive[~real].any()
        visual = 0
        for sample in result.report.samples:
            for image in sample.images:
                visual += image.num_visual
                assert_met(image, method, last=image is sample.images[-1])
        assert visual == int((real & ~text).sum())
        masked = oracle_forward(model, inputs, result.alive, result.positions, result.values)
        expected_logits = oracle_expand(masked, result.alive[-1])
        assert (result.logits - expected_logits)[real].abs().max() < 1e-5

    check()


@pytest.mark.slow(cases=3)
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl"])
def test_any_chain_keeps_text_and_equals_the_masked_model(family: str) -> None:
    model = model_of(family)

    @FEW
    @given(
        inputs=batches(family),
        first=st.floats(0.1, 1.0),
        layers=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(sorted),
        ratio=st.floats(0.1, 1.0),
    )
    def check(inputs: dict[str, Any], first: float, layers: list[int], ratio: float) -> None:
        chain = [make_compressor("random", keep_ratio=first)]
        chain += [make_compressor("fastv", keep_ratio=ratio, layer=layer) for layer in layers]
        result = run(model, inputs, chain, positions="original")
        ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
        text = real & (ids != IMAGE_ID) & (ids != VIDEO_ID)
        assert torch.stack(result.alive)[:, text].all()
        for image in (i for s in result.report.samples for i in s.images):
            left = image.num_visual
            for method, placement in zip(chain, image.placements, strict=True):
                (left,) = asked(method, left)
                assert placement.num_kept == left
        masked = oracle_forward(model, inputs, result.alive, "original")
        expected = oracle_expand(masked, result.alive[-1])
        assert (result.logits - expected)[real].abs().max() < 1e-5

    check()
