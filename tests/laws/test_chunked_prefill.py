"""Laws 1 and 9 for `prefill_chunk_size`: what is kept is chosen once, on the whole prompt.

The oracle is the same call without chunks, which the other laws hold to masked models.
"""

from typing import Any

import pytest
import torch
from tests.laws.cases import (
    CASES,
    GISTS,
    VIDEO_SAMPLES,
    cases,
    inputs_of,
    make,
    make_inputs,
    model_of,
)
from tests.laws.windows import batch, windowed
from tests.tiny import Image, Sample, Text, gist_tokens
from transformers import DynamicCache

from vispress import compressed, compression_report
from vispress.errors import UnsupportedMethodError, UnsupportedModelError
from vispress.methods import DivPrune, Uniform
from vispress.report import CompressionReport
from vispress.runtime.kv_cache.hf_compat import CACHE, CHUNKS_HAVE_PICTURES
from vispress.types import Stage

# what transformers 5.17 does, which loses the pictures, is in test_law11_refusals.py
pytestmark = pytest.mark.skipif(not CHUNKS_HAVE_PICTURES, reason="chunks without pictures")
SIZES = (1, 3, 7, 1000)


def ahead(case: tuple[str, str]) -> bool:
    """Whether all of a method happens before the language model, without a look into it."""
    placements = make(*case).placements(len(model_of(case[0]).model.language_model.layers))
    return all(
        one.stage in (Stage.ENCODER, Stage.PRE_LLM) and one.probe is None and one.queries is None
        for one in placements
    )


AHEAD = [case for case in CASES if ahead(case)]
INSIDE = [case for case in CASES if not ahead(case)]


def test_methods_on_either_side_are_the_ones_meant() -> None:
    served, refused = ({method for _, method in some} for some in (AHEAD, INSIDE))
    assert {"divprune", "visionzip", "tome", "vispruner", "cdpruner"} <= served
    assert {"fastv", "scm", "cmai", "pmod", "voco", "attended_cache"} <= refused
    assert served | refused == {method for _, method in CASES}


def generate(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    return model.generate(
        **inputs,
        **({"do_sample": False} | more),
        max_new_tokens=3,
        min_new_tokens=3,
        output_logits=True,
        return_dict_in_generate=True,
    )


def said(report: CompressionReport) -> tuple[Any, ...]:
    alive = [report.alive(layer).tolist() for layer in range(report.num_layers)]
    return str(report), report.to_dict(), report.length, report.kv_bytes, alive


def agree(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    assert (torch.stack(got.logits) - torch.stack(expected.logits)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("family", "method", "size"), cases("chunked prefill", AHEAD, turning=SIZES)
)
def test_chunks_give_and_report_what_the_whole_prompt_does(
    family: str, method: str, size: int
) -> None:
    model, inputs = model_of(family), inputs_of(family)
    with compressed(model, make(family, method)):
        expected = generate(model, inputs)
        whole = said(compression_report(model))
        got = generate(model, inputs, prefill_chunk_size=size)
        agree(got, expected)
        assert said(compression_report(model)) == whole


@pytest.mark.parametrize(("family", "method"), cases("refused chunks", INSIDE))
def test_methods_inside_the_language_model_are_refused(family: str, method: str) -> None:
    model = model_of(family)
    with gist_tokens(int(method in GISTS)):
        inputs = inputs_of(family)
    text = make_inputs(family, [Sample([Text(9)])])
    with compressed(model, make(family, method)):
        with pytest.raises(UnsupportedMethodError, match=f"{method} acts.*prefill_chunk_size"):
            generate(model, inputs, prefill_chunk_size=7)
        got = generate(model, text, prefill_chunk_size=4)
    assert torch.equal(got.sequences, generate(model, text, prefill_chunk_size=4).sequences)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_videos_come_in_chunks(family: str) -> None:
    model, inputs = model_of(family), make_inputs(family, VIDEO_SAMPLES, padding="left")
    with compressed(model, make(family, "vidcom2")):
        expected = generate(model, inputs)
        whole = said(compression_report(model))
        agree(generate(model, inputs, prefill_chunk_size=7), expected)
        assert said(compression_report(model)) == whole


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("mode", ["eager", "beams", "right", "removed"])
def test_chunks_in_other_modes(family: str, mode: str) -> None:
    model, inputs = model_of(family), inputs_of(family, "right" if mode == "right" else "left")
    more = {"num_beams": 3, "num_return_sequences": 2} if mode == "beams" else {}
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager" if mode == "eager" else before)
        with compressed(model, make(family, "divprune")):
            expected = generate(model, inputs, **more)
            agree(generate(model, inputs, prefill_chunk_size=5, **more), expected)
        assert "_prefill" not in vars(model)
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_chunk_may_hold_no_row_and_the_last_survivor_answers(size: int, positions: Any) -> None:
    """The prompts end with dropped tokens, so that the answer begins in such a chunk."""
    model = model_of("llava")
    inputs = make_inputs(
        "llava", [Sample([Text(3), Image(6, 6)]), Sample([Text(5), Image(4, 6)])], padding="left"
    )
    with compressed(model, Uniform(num_tokens=1), positions=positions):
        expected = generate(model, inputs)
        whole = said(compression_report(model))
        assert not compression_report(model).alive(0)[:, -4:].any()
        agree(generate(model, inputs, prefill_chunk_size=size), expected)
        assert said(compression_report(model)) == whole


@pytest.mark.parametrize("size", [3, 1000])
def test_a_later_turn_with_a_picture_comes_in_chunks_too(size: int) -> None:
    model = model_of("llava")
    first = make_inputs("llava", [Sample([Text(4), Image(4, 4), Text(5)])])
    more = make_inputs("llava", [Sample([Text(3), Image(4, 6), Text(6)])], seed=5)

    def turns(**chunks: Any) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
        cache = DynamicCache()
        with compressed(model, make("llava", "divprune")):
            one = generate(model, first, **{CACHE: cache}, **chunks).sequences
            ids = torch.cat([one, more["input_ids"]], dim=1)
            both = more | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            two = generate(model, both, **{CACHE: cache}, **chunks)
            seen = said(compression_report(model))
            ids = torch.cat([two.sequences, more["input_ids"][:, -5:]], dim=1)
            text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            three = generate(model, text, **{CACHE: cache}, **chunks)
            return three, seen, said(compression_report(model))

    expected, got = turns(), turns(prefill_chunk_size=size)
    agree(got[0], expected[0])
    assert got[1:] == expected[1:]


def test_chunks_of_text_are_one_turn() -> None:
    model, cache = model_of("llava"), DynamicCache()
    text = make_inputs("llava", [Sample([Text(9)])])
    picture = make_inputs("llava", [Sample([Text(3), Image(4, 6), Text(6)])])
    with compressed(model, make("llava", "divprune")):
        one = generate(model, text, **{CACHE: cache}, prefill_chunk_size=4).sequences
        ids = torch.cat([one, picture["input_ids"]], dim=1)
        both = picture | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        generate(model, both, **{CACHE: cache}, prefill_chunk_size=4)
        report = compression_report(model)
    assert (report.turn, report.turns, report.length) == (2, 2, ids.shape[1])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_without_a_choice_chunks_are_the_models_own(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    text = make_inputs(family, [Sample([Text(9)]), Sample([Text(5)])], padding="left")
    expected = [generate(model, x, prefill_chunk_size=4) for x in (inputs, text)]
    with compressed(model, DivPrune(keep_ratio=1.0)):
        got = [generate(model, x, prefill_chunk_size=4) for x in (inputs, text)]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(torch.stack(one.logits), torch.stack(other.logits))


@pytest.mark.parametrize("window", [4, 11])
def test_chunks_of_models_with_windows(window: int) -> None:
    model, inputs = windowed("mistral", window), batch("mistral")
    with compressed(model, make("llava", "divprune")):
        expected = generate(model, inputs)
        agree(generate(model, inputs, prefill_chunk_size=5), expected)


def test_a_static_cache_is_refused() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    refusal = pytest.raises(UnsupportedModelError, match=r"prefill_chunk_size.*DynamicCache\(\)")
    with compressed(model, make("llava", "divprune")), refusal:
        generate(model, inputs, prefill_chunk_size=5, cache_implementation="static")


def test_what_ends_a_chunk_leaves_the_next_call_right() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    calls: list[int] = []

    def fails(*_: Any) -> None:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with compressed(model, make("llava", "divprune")):
        expected = generate(model, inputs)
        handle = model.model.language_model.layers[1].register_forward_pre_hook(fails)
        with pytest.raises(KeyboardInterrupt):
            generate(model, inputs, prefill_chunk_size=7)
        handle.remove()
        agree(generate(model, inputs), expected)
        agree(generate(model, inputs, prefill_chunk_size=7), expected)
