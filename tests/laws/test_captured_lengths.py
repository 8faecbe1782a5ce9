"""Prompts of several lengths share a graph, and each gives what it gives alone.

What stands behind a lengthened prompt may be seen nowhere: not in logits, caches, reports, or what
is decoded next.
"""

from typing import Any

import pytest
import torch
from tests.laws.capturing import generated, prefill, taped
from tests.laws.cases import GISTS, cases, make, model_of
from tests.tiny import Image, Sample, Text, build, gist_tokens, make_inputs
from transformers import StaticCache

from vispress import compressed, prompt_lengths
from vispress.adapters.base import find_adapter
from vispress.kinds import PROMPT_SIGNALS, Stage
from vispress.runtime.kv_cache.hf_compat import CACHE

QUESTIONS = (7, 9, 4)
"""Tokens of text behind the image."""
BUCKET = 64


def asked(family: str, question: int, rows: int = 1) -> dict[str, Any]:
    """A prompt with an image in the same place, and in a batch one that is shorter."""
    samples = [Sample([Text(5), Image(4, 4), Text(question)])]
    samples += [Sample([Text(2), Image(4, 4), Text(question)])] * (rows - 1)
    return make_inputs(family, samples, padding="left", seed=question)


def alike(found: Any, expected: Any) -> bool:
    """The same kept tokens, report and places; logits and cache but for rounding."""
    pairs = list(zip(found[0], expected[0], strict=True))
    return found[1] == expected[1] and all(
        a.shape == b.shape and a.is_contiguous() and torch.allclose(a, b, rtol=0, atol=1e-9)
        for a, b in pairs
    )


@pytest.mark.parametrize(
    ("family", "method", "rows"),
    [
        ("llava", "divprune", 2),
        ("qwen2_5_vl", "divprune", 1),
        ("qwen3_vl", "vidcom2", 2),
        ("llava_next", None, 1),
    ],
)
def test_questions_of_several_lengths_share_a_graph(
    family: str, method: str | None, rows: int
) -> None:
    model, calls = model_of(family), [asked(family, n, rows) for n in QUESTIONS]

    def talk() -> list[Any]:
        found = []
        for given in calls:
            found += [prefill(model, given), prefill(model, given, logits_to_keep=2)]
        return found

    def check() -> None:
        expected, answers = talk(), [generated(model, given) for given in calls]
        with taped(model, prompt_bucket=BUCKET) as captured:
            assert all(alike(a, b) for a, b in zip(talk(), expected, strict=True))
            for given, wanted in zip(calls, answers, strict=True):
                found = generated(model, given)
                assert torch.equal(found.sequences, wanted.sequences)
                for a, b in zip(found.logits, wanted.logits, strict=True):
                    assert (a - b).abs().max() < 1e-9
            report = captured.report()
            assert not report.fallbacks
            assert not report.exact
            assert report.recorded == 4  # all logits, two, one (from generate), and a step

    if method is None:
        check()
        return
    with compressed(model, make(family, method)):
        check()


@pytest.mark.some(cases=3)
@pytest.mark.parametrize(("family", "method"), cases("captured lengths", every_method=True))
def test_methods_that_would_see_more_text_keep_lengths_and_say_so(family: str, method: str) -> None:
    model, compressor = model_of(family), make(family, method)
    if compressor.uncapturable():
        return
    placements = compressor.placements(len(find_adapter(model).decoder_layers))
    sees = any(
        one.stage not in (Stage.PRE_LLM, Stage.ENCODER) or one.queries is not None
        for one in placements
    )
    sees = sees or bool(compressor.signals() & PROMPT_SIGNALS)
    with gist_tokens(int(method in GISTS)):
        calls = [asked(family, n) for n in QUESTIONS]
    with compressed(model, compressor):
        expected = [prefill(model, given) for given in calls]
        with taped(model, prompt_bucket=BUCKET) as captured:
            found = [prefill(model, given) for given in calls]
            assert all(alike(a, b) for a, b in zip(found, expected, strict=True))
            report = captured.report()
            assert report.prefills == 3
            assert report.recorded == (3 if sees else 1), str(report)
            assert bool(report.exact) == sees
            assert all(why.startswith(f"{method} ") for why in report.exact)


def test_texts_share_a_graph_under_any_method() -> None:
    model = model_of("llava")
    texts = [{"input_ids": torch.full((1, n), 7)} for n in (9, 12)]
    with compressed(model, make("llava", "fastv")):
        expected = [generated(model, text).sequences for text in texts]
        with taped(model, prompt_bucket=BUCKET) as captured:
            for text, wanted in zip(texts, expected, strict=True):
                assert torch.equal(generated(model, text).sequences, wanted)
            assert captured.report().recorded == 2


def test_what_keeps_a_prompt_at_its_length_is_said() -> None:
    model, given = build("llava"), asked("llava", 7)
    length = given["input_ids"].shape[1]
    right = make_inputs(
        "llava", [Sample([Text(5), Image(4, 4), Text(n)]) for n in (7, 3)], padding="right"
    )
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=60)
    packed = torch.cat([torch.arange(length - 6), torch.arange(6)])[None]
    calls: list[tuple[dict[str, Any], str]] = [
        (right, "hides the last token"),
        (given | {CACHE: static}, "static"),
        (given | {"output_hidden_states": True}, "output_hidden_states"),
        (given | {"return_dict": False}, "return_dict"),
        (given | {"position_ids": packed}, "do not go on"),
        (given | {"logits_to_keep": length + 1}, "logits_to_keep"),
    ]
    with taped(model, prompt_bucket=BUCKET) as captured:
        for call, why in calls:
            with torch.no_grad():
                model(**call)
            assert any(why in one for one in captured.report().exact), (why, captured.report())
        with prompt_lengths([length - 2]), torch.no_grad():
            model(**given)
        assert len(captured.report().exact) == len(calls) + 1
        assert "exact length" in str(captured.report())
        assert not captured.fallbacks
