"""A captured model gives what it gives without: what a tape can do, a CUDA graph can.

The tape runs recorded operations on the memory that they were recorded on, and no Python: whatever
was decided while recording (counts, places, branches) stands, and a value that it rested on would
be the first call's. So a second picture and text of a layout tell whether a graph would be right.
"""

import copy
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.laws.cases import GISTS, SAMPLES, VIDEO_CASES, VIDEO_SAMPLES, cases, make, model_of
from tests.laws.test_decode_cost import python_calls
from tests.laws.test_layout_cache import variants
from tests.tiny import Image, Sample, Text, build, gist_tokens, make_inputs
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from vispress import (
    capture,
    compress_model,
    compressed,
    compression_report,
    prompt_lengths,
    remove_compression,
    update_compression,
)
from vispress.errors import CompressionStateError, ConfigError, UnsupportedModelError
from vispress.runtime.graphs.backends import Tape, Tapes
from vispress.runtime.graphs.lodging import lodging_of
from vispress.runtime.kv_cache.hf_compat import CACHE, cache_of

ONE = (Sample([Text(5), Image(4, 4), Text(7)]),)
OTHER = (Sample([Text(9), Image(4, 4), Text(3)]),)
SEEDS = (0, 7)
LITTLE = 0.25
"""Python calls around a graph, as a share of those of the call that it stands for."""


def batches(family: str, samples: tuple[Sample, ...], gists: int = 0) -> list[dict[str, Any]]:
    """Inputs of one layout."""
    with gist_tokens(gists):
        return [make_inputs(family, samples, padding="left", seed=seed) for seed in SEEDS]


def taped(model: Any, *, prompt_bucket: int = 1, **options: Any) -> Any:
    return capture(model, backend="tape", prompt_bucket=prompt_bucket, **options)


def stored(cache: Any) -> list[Tensor]:
    """What the layers of a cache hold, and where it stood."""
    found = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    for layer in cache.layers:
        slots = getattr(layer, "slots", None)
        parts = () if slots is None else (slots.positions, slots.valid, slots.shift)
        found += [part for part in parts if part is not None]
    return found


def prefill(model: Any, inputs: Mapping[str, Any], **more: Any) -> tuple[list[Tensor], str]:
    """Logits and cache of a prefill, and the report on it."""
    with torch.no_grad():
        out = model(**inputs, **more)
    try:
        report = str(compression_report(model).to_dict()) + str(compression_report(model))
    except CompressionStateError:
        report = ""
    return [out.logits, *stored(cache_of(out))], report


def same(found: tuple[list[Tensor], str], expected: tuple[list[Tensor], str]) -> bool:
    equal = all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    return equal and found[1] == expected[1]


def generated(model: Any, inputs: Mapping[str, Any], **more: Any) -> Any:
    greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    return model.generate(
        **inputs, **greedy, return_dict_in_generate=True, output_logits=True, **more
    )


def check(model: Any, captured: Any, inputs: list[dict[str, Any]], expected: list[Any]) -> None:
    for given, wanted in zip((*inputs, *inputs), (*expected, *expected), strict=True):
        assert same(prefill(model, given), wanted)
    assert captured.report().prefills == 4, str(captured.report())
    assert captured.report().recorded == 1


@pytest.mark.parametrize(("family", "method"), cases("captured"))
def test_prefills_have_the_bits_of_uncaptured_ones(family: str, method: str) -> None:
    model, inputs = model_of(family), batches(family, SAMPLES, int(method in GISTS))
    compressor = make(family, method)
    with compressed(model, compressor):
        expected = [prefill(model, given) for given in inputs]
        with taped(model) as captured:
            if why := compressor.uncapturable():
                assert same(prefill(model, inputs[0]), expected[0])
                assert captured.fallbacks == {f"{method}: {why}": 1}
            else:
                check(model, captured, inputs, expected)


@pytest.mark.some(cases=8)
@pytest.mark.parametrize(("family", "method"), VIDEO_CASES)
def test_so_have_those_of_videos(family: str, method: str) -> None:
    model, inputs, compressor = (
        model_of(family),
        batches(family, VIDEO_SAMPLES),
        make(family, method),
    )
    if compressor.uncapturable():
        return
    with compressed(model, compressor):
        expected = [prefill(model, given) for given in inputs]
        with taped(model) as captured:
            check(model, captured, inputs, expected)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "llava_next"])
def test_untouched_models_are_captured_too(family: str) -> None:
    model, inputs = model_of(family), batches(family, SAMPLES)
    expected = [prefill(model, given) for given in inputs]
    answers = [generated(model, given).sequences for given in inputs]
    with taped(model) as captured:
        check(model, captured, inputs, expected)
        for given, answer in zip(inputs, answers, strict=True):
            assert torch.equal(generated(model, given).sequences, answer)
        assert captured.report().steps == 6
        assert not captured.fallbacks


def test_a_text_of_an_untouched_model_is_captured_too() -> None:
    model, (inputs, _) = model_of("llava"), batches("llava", ONE)
    texts = [torch.full((1, 9), token) for token in (7, 8)]
    expected = [prefill(model, {"input_ids": text}) for text in texts]
    with taped(model) as captured:
        for text, wanted in zip(texts, expected, strict=True):
            assert same(prefill(model, {"input_ids": text}), wanted)
        prefill(model, inputs)
        assert captured.report().recorded == 2
        assert captured.report().prefills == 3


@pytest.mark.parametrize("method", ["divprune", "cmai", "prumerge"])  # one cannot be captured
def test_so_is_a_text_of_a_compressed_model(method: str) -> None:
    model, (inputs, _) = model_of("llava"), batches("llava", ONE)
    texts = [{"input_ids": torch.full((1, 9), token)} for token in (7, 8)]

    def talk() -> list[Any]:
        """A text, an answer to one, pictures behind one on its cache, and what is reported."""
        found: list[Any] = []
        for text in texts:
            found += [prefill(model, text), generated(model, text).sequences.tolist(), told()]
        cache = DynamicCache(config=model.config.text_config)
        found.append(prefill(model, texts[0], **{CACHE: cache}))
        mask = torch.ones(1, 9 + inputs["input_ids"].shape[1]).long()
        found.append(prefill(model, inputs | {"attention_mask": mask}, **{CACHE: cache}))
        return [*found, told()]

    def told() -> str:
        try:
            return str(compression_report(model).turns)
        except CompressionStateError as error:
            return str(error)

    with compressed(model, make("llava", method)):
        expected = talk()
        with taped(model) as captured:
            for one, wanted in zip(talk(), expected, strict=True):
                assert same(one, wanted) if isinstance(wanted, tuple) else one == wanted
            assert captured.report().prefills == 5, str(captured.report())
            generated(model, texts[0], prefill_chunk_size=4)
            assert any("in chunks" in why for why in captured.fallbacks), captured.fallbacks


@pytest.mark.parametrize(("family", "method"), cases("captured answers"))
def test_answers_are_those_of_uncaptured_models(family: str, method: str) -> None:
    model, inputs = model_of(family), batches(family, SAMPLES, int(method in GISTS))
    compressor = make(family, method)
    with compressed(model, compressor):
        expected = [generated(model, given) for given in inputs]
        with taped(model) as captured:
            for given, wanted in zip(inputs, expected, strict=True):
                found = generated(model, given)
                assert torch.equal(found.sequences, wanted.sequences)
                for a, b in zip(found.logits, wanted.logits, strict=True):
                    assert (a - b).abs().max() < 1e-9
            report = captured.report()
        assert report.steps == 6 or any("at each step" in why for why in report.fallbacks)


@pytest.mark.parametrize("method", [None, "divprune", "fastv", "pyramiddrop"])
def test_steps_on_a_static_cache_have_the_bits_of_uncaptured_ones(method: str | None) -> None:
    model, inputs = model_of("llava"), batches("llava", SAMPLES)
    if method:
        compress_model(model, make("llava", method))
    try:
        expected = [generated(model, given, cache_implementation="static") for given in inputs]
        with taped(model) as captured:
            for given, wanted in zip(inputs, expected, strict=True):
                found = generated(model, given, cache_implementation="static")
                assert torch.equal(torch.stack(found.logits), torch.stack(wanted.logits))
            assert captured.report().steps == 6, str(captured.report())
    finally:
        if method:
            remove_compression(model)


# --- conversations


def step(model: Any, cache: Any, mask: Tensor, token: int = 9) -> Tensor:
    """Logits of one token more, of one sample."""
    given = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1, CACHE: cache}
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.full((len(mask), 1), token), **given).logits
    return logits


def begun(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
    return cache, inputs["attention_mask"]


def longer(mask: Tensor, count: int = 1) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), count)], dim=1)


@pytest.mark.parametrize("method", ["fastv", "divprune"])
def test_conversations_take_turns_in_one_graph(method: str) -> None:
    model, inputs = model_of("llava"), batches("llava", ONE)
    with compressed(model, make("llava", method)):

        def talk() -> list[Tensor]:
            caches, masks = zip(*(begun(model, given) for given in inputs), strict=True)
            found = []
            for token in range(3):
                masks = tuple(map(longer, masks))
                for cache, mask in zip(caches, masks, strict=True):
                    found.append(step(model, cache, mask, 9 + token))
            return [*found, *stored(caches[0]), *stored(caches[1])]

        expected = talk()
        with taped(model) as captured:
            found = talk()
            assert captured.report().recorded == 2
        assert all((a - b).abs().max() < 1e-9 for a, b in zip(found, expected, strict=True))


def test_a_cache_moves_out_for_whoever_reads_it() -> None:
    model, (inputs, _) = model_of("llava"), batches("llava", ONE)
    with compressed(model, make("llava", "fastv")):

        def talk(look: Any) -> list[Tensor]:
            cache, mask = begun(model, inputs)
            found = []
            for _ in range(2):
                mask = longer(mask)
                found.append(step(model, cache, mask))
            cache = look(cache)
            assert lodging_of(cache) is None
            found.append(step(model, cache, longer(mask)))
            more = longer(mask, 3)
            with torch.no_grad():
                ids = torch.full((1, 2), 5)
                found.append(model(input_ids=ids, attention_mask=more, **{CACHE: cache}).logits)
            return found

        def cropped(cache: Any) -> Any:
            cache.crop(-1)
            return step_again(cache)

        def step_again(cache: Any) -> Any:
            step(model, cache, inputs["attention_mask"].new_ones(1, 2 + length))
            cache.layers[0].keys  # noqa: B018  (reads it)
            return cache

        def batch_moved(cache: Any) -> Any:
            cache.reorder_cache(torch.tensor([0]))
            return cache

        length = inputs["input_ids"].shape[1]
        for look in (copy.deepcopy, cropped, batch_moved):
            expected = talk(look)
            with taped(model) as captured:
                found = talk(look)
                assert captured.report().steps >= 3
            assert all((a - b).abs().max() < 1e-9 for a, b in zip(found, expected, strict=True))


def test_a_lodged_cache_tells_its_length_and_stays() -> None:
    model, (inputs, _) = model_of("llava"), batches("llava", ONE)
    with compressed(model, make("llava", "fastv")), taped(model):
        cache, mask = begun(model, inputs)
        step(model, cache, longer(mask))
        assert cache.get_seq_length() == mask.shape[1] + 1
        assert cache.get_mask_sizes(1, 0) == (mask.shape[1] + 2, 0)
        assert lodging_of(cache) is not None
        assert cache.layers[-1].keys.shape[2] < mask.shape[1]
        assert lodging_of(cache) is None


def test_an_answer_outgrows_its_bucket_and_moves_on() -> None:
    model, (inputs, _) = model_of("llava"), batches("llava", ONE)
    with compressed(model, make("llava", "fastv")):
        options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
        expected = model.generate(**inputs, **options)
        with taped(model, bucket=16) as captured:
            assert torch.equal(model.generate(**inputs, **options), expected)
            assert captured.report().recorded >= 3
            assert captured.report().steps == 19


def test_beams_run_and_are_left_alone_soon() -> None:
    model, (inputs, _) = model_of("llava"), batches("llava", ONE)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 3}
    with compressed(model, make("llava", "fastv")):
        expected = model.generate(**inputs, **options)
        with taped(model) as captured:
            assert torch.equal(model.generate(**inputs, **options), expected)
        assert any("between steps" in why for why in captured.fallbacks)


# --- the pool


def test_layouts_take_turns_and_the_oldest_goes() -> None:
    model = model_of("llava")
    calls = [*batches("llava", ONE), *batches("llava", OTHER)]
    with compressed(model, make("llava", "fastv")):
        expected = [prefill(model, given) for given in calls]
        for most, recorded in ((2, 2), (1, 7)):
            with taped(model, max_graphs=most) as captured:
                for at in (0, 2, 1, 3, 2, 0, 3, 1):
                    assert same(prefill(model, calls[at]), expected[at])
                report = captured.report()
                assert (report.graphs, report.recorded) == (most, recorded)
                assert report.evicted == recorded - most


def test_what_a_call_gave_is_its_own() -> None:
    model, inputs = model_of("llava"), batches("llava", ONE)
    with compressed(model, make("llava", "fastv")), taped(model):
        first = prefill(model, inputs[0])
        kept = [tensor.clone() for tensor in first[0]]
        alive = compression_report(model).alive(5)
        before = alive.clone()
        prefill(model, inputs[1])
        assert all(torch.equal(a, b) for a, b in zip(first[0], kept, strict=True))
        assert torch.equal(alive, before)


def test_compression_may_change_beneath() -> None:
    model, inputs = build("llava"), batches("llava", ONE)
    plain = prefill(model, inputs[1])

    def of(**options: Any) -> Any:
        with compressed(model, "fastv", **options):
            return prefill(model, inputs[1])

    half, most = of(keep_ratio=0.5), of(keep_ratio=0.9)
    taught = inputs[1] | {"labels": torch.full_like(inputs[1]["input_ids"], -100)}
    taught["labels"][:, -4:] = 9  # they say where the prompt ends
    with compressed(model, "fastv", keep_ratio=0.5):
        told = prefill(model, taught)
    with taped(model) as captured:
        assert same(prefill(model, inputs[1]), plain)
        compress_model(model, "fastv", keep_ratio=0.5)
        assert same(prefill(model, inputs[1]), half)
        assert same(prefill(model, taught), told)
        update_compression(model, keep_ratio=0.9)
        assert same(prefill(model, inputs[1]), most)
        remove_compression(model)
        assert same(prefill(model, inputs[1]), plain)
        assert captured.report().prefills == 4
    assert "forward" not in model.__dict__


def test_weights_may_change_beneath() -> None:
    model, (inputs, _) = build("llava"), batches("llava", ONE)
    with taped(model) as captured:
        before = prefill(model, inputs)
        with torch.no_grad():
            model.lm_head.weight.mul_(2.0)
        doubled = prefill(model, inputs)
        assert torch.equal(doubled[0][0], 2.0 * before[0][0])
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() / 2.0)
        captured.remove()
    with taped(model) as captured:
        assert same(prefill(model, inputs), before)
        with torch.no_grad():
            model.lm_head.weight.data = 2.0 * model.lm_head.weight
        assert same(prefill(model, inputs), doubled)
        assert captured.report().recorded == 2


def test_threads_share_a_captured_model() -> None:
    model = model_of("llava")
    calls = [*batches("llava", ONE), *batches("llava", OTHER)]
    with compressed(model, make("llava", "fastv")):
        expected = [generated(model, given).sequences for given in calls]
        with taped(model), ThreadPoolExecutor(4) as pool:
            for _ in range(2):
                found = pool.map(lambda given: generated(model, given).sequences, calls)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize("method", [None, "divprune", "fastv"])
def test_around_a_graph_python_has_little_to_do(
    method: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (inputs, _) = build("llava", layers=32, dtype=torch.float32), batches("llava", ONE)
    inputs["pixel_values"] = inputs["pixel_values"].float()

    def calls() -> tuple[int, int]:
        with torch.inference_mode():
            cache, mask = begun(model, inputs)
            step(model, cache, longer(mask))
            first = python_calls(lambda: begun(model, inputs))
            return first, python_calls(lambda: step(model, cache, longer(mask, 2)))

    if method:
        compress_model(model, make("llava", method))
    eager = calls()
    with taped(model) as captured:
        calls()
        monkeypatch.setattr(Tape, "replay", lambda tape: None)
        found = calls()
        assert not captured.fallbacks
    for some, all_of_them in zip(found, eager, strict=True):
        assert some <= LITTLE * all_of_them


# --- what no graph has


REASONS: list[tuple[dict[str, Any], str]] = [
    ({"output_attentions": True}, "output_attentions"),
    ({"labels": True}, "labels"),
    ({"inputs_embeds": True}, "embeddings"),
    ({"prompt_lengths": [5]}, "prompt_lengths"),
]


@pytest.mark.parametrize(("more", "why"), REASONS)
def test_what_no_graph_has_runs_as_it_would_have(more: dict[str, Any], why: str) -> None:
    model, (inputs, _) = build("llava", attn="eager"), batches("llava", ONE)
    given = dict(inputs) | more
    if more.get("labels"):
        given["labels"] = inputs["input_ids"]
    if more.get("inputs_embeds"):
        given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids")).detach()
    with torch.no_grad(), compressed(model, "divprune", keep_ratio=0.5):
        expected = model(**given).logits
        with taped(model) as captured:
            assert torch.equal(model(**given).logits, expected)
            (found,) = captured.fallbacks
            assert why in found
            assert why in str(captured.report())


def test_training_and_gradients_run_as_they_would_have() -> None:
    model, (inputs, _) = build("llava"), batches("llava", ONE)
    with taped(model) as captured:
        model(**inputs).logits.sum().backward()
        assert model.lm_head.weight.grad is not None
        model.train()
        with torch.no_grad():
            model(**inputs)
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(**inputs)
    assert [word for why in captured.fallbacks for word in ("gradients", "training", "autocast")
            if word in why] == ["gradients", "training", "autocast"]  # fmt: skip


class BrokenError(Exception):
    """What a test throws."""


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
def test_an_error_amid_a_recording_leaves_the_next_call_right(error: type[BaseException]) -> None:
    model, inputs = build("llava"), batches("llava", ONE)
    with compressed(model, "fastv", keep_ratio=0.5):
        expected = [prefill(model, given) for given in inputs]
        with taped(model) as captured:
            for after in (0, 1, 2):
                captured.drop()
                calls = iter(range(10))

                def breaks(module: Any, args: Any, after: int = after, calls: Any = calls) -> None:
                    if next(calls) >= after:
                        raise error

                hook = model.model.language_model.layers[3].register_forward_pre_hook(breaks)
                with pytest.raises(error):
                    prefill(model, inputs[0])
                hook.remove()
                for given, wanted in zip(inputs, expected, strict=True):
                    assert same(prefill(model, given), wanted)
        assert same(prefill(model, inputs[0]), expected[0])


def test_graphs_go_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (inputs, _), (other, _) = build("llava"), batches("llava", ONE), batches("llava", OTHER)
    expected = prefill(model, other)

    def fails(tapes: Any, run: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("out of memory")

    with taped(model) as captured:
        prefill(model, inputs)
        monkeypatch.setattr(Tapes, "record", fails)
        assert same(prefill(model, other), expected)
        assert captured.report().graphs == 0
        assert captured.fallbacks == {"recording failed: out of memory": 1}


def test_removal_leaves_nothing() -> None:
    model, (inputs, _) = build("llava"), batches("llava", ONE)
    prefill(model, inputs)
    before = [dict(vars(module)) for module in model.modules()]
    captured = taped(model)
    cache, mask = begun(model, inputs)
    step(model, cache, longer(mask))
    assert lodging_of(cache) is not None
    captured.remove()
    captured.remove()
    assert lodging_of(cache) is None
    assert [dict(vars(module)) for module in model.modules()] == before
    assert captured.report().graphs == 0


def test_a_copy_of_a_captured_model_is_not_captured() -> None:
    model, (inputs, _) = build("llava"), batches("llava", ONE)
    with compressed(model, "fastv", keep_ratio=0.5):
        expected = prefill(model, inputs)
        with taped(model) as captured:
            prefill(model, inputs)
            twin = copy.deepcopy(model)
            assert same(prefill(twin, inputs), expected)
            assert captured.report().prefills == 1
            with taped(twin) as other:
                assert same(prefill(twin, inputs), expected)
                assert other.report().prefills == 1
            assert same(prefill(twin, inputs), expected)


@pytest.mark.slow
def test_compiled_layers_are_right() -> None:
    model, inputs = build("llava"), batches("llava", ONE)
    expected = [prefill(model, given) for given in inputs]
    for layer in model.model.language_model.layers:
        layer.compile(backend="eager")
    with taped(model) as captured:
        for given, wanted in zip(inputs, expected, strict=True):
            assert same(prefill(model, given), wanted)
        assert captured.report().prefills == 2


@pytest.mark.parametrize("method", ["fastv", "cdpruner"])
def test_layouts_are_not_taken_for_each_other(method: str) -> None:
    model = build("llava")
    calls = [given for given in variants() if not {"labels", "prompt_lengths"} & {*given}]
    with compressed(model, make("llava", method)):
        expected = [prefill(model, given, use_cache=True) for given in calls]
        with taped(model) as captured:
            for given, wanted in zip(calls * 2, expected * 2, strict=True):
                assert same(prefill(model, given, use_cache=True), wanted)
            assert captured.report().recorded == len(calls) - 1  # one is the first in other values


def test_told_prompts_are_not_taken_for_each_other() -> None:
    model, (inputs, _) = build("llava"), batches("llava", ONE)
    length = inputs["input_ids"].shape[1]
    with compressed(model, make("llava", "fastv")):

        def told(gone: int) -> Any:
            with prompt_lengths([length - gone]):
                return prefill(model, inputs)

        expected = [told(gone) for gone in (0, 3)]
        assert not same(*expected)
        with taped(model):
            assert all(
                same(told(gone), wanted) for gone, wanted in zip((0, 3), expected, strict=True)
            )


def test_what_a_conversation_leaves_in_a_graph_harms_no_other() -> None:
    model, inputs = model_of("llava"), batches("llava", ONE)
    cache, mask = begun(model, inputs[1])
    expected = step(model, cache, longer(mask))
    with taped(model):
        for given in inputs:
            cache, mask = begun(model, given)
            if given is inputs[0]:
                for layer in cache.layers:
                    layer.values = torch.cat([layer.values, layer.values * torch.nan], dim=2)
                    layer.keys = torch.cat([layer.keys, layer.keys], dim=2)
                mask = torch.cat([mask, mask], dim=1)
            found = step(model, cache, longer(mask))
        assert (found - expected).abs().max() < 1e-9


def test_capture_is_refused_by_name() -> None:
    model = build("llava")
    with pytest.raises(UnsupportedModelError, match="CUDA graphs need a CUDA device"):
        capture(model)
    with pytest.raises(ConfigError, match="max_graphs"):
        taped(model, max_graphs=0)
    with pytest.raises(ConfigError, match="bucket"):
        taped(model, bucket=1)
    with pytest.raises(ConfigError, match="prompt_bucket"):
        taped(model, prompt_bucket=0)
    with pytest.raises(ConfigError, match="backend must be"):
        capture(model, backend="cpu")  # type: ignore[arg-type]
    with taped(model), pytest.raises(CompressionStateError, match="captured already"):
        taped(model)
    model.lm_head.to("meta")
    with pytest.raises(UnsupportedModelError, match="one device, and this is on cpu, meta"):
        taped(model)


def test_static_caches_of_prefills_are_filled_as_they_would_be() -> None:
    model, inputs = model_of("llava"), batches("llava", ONE)

    def static() -> Any:
        return StaticCache(config=model.config.get_text_config(), max_cache_len=60)

    with compressed(model, make("llava", "fastv")):
        expected = [prefill(model, given, **{CACHE: static()}) for given in inputs]
        with taped(model) as captured:
            for given, wanted in zip(inputs, expected, strict=True):
                assert same(prefill(model, given, **{CACHE: static()}), wanted)
            assert captured.report().prefills == 2
