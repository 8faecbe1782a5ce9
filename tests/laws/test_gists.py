"""Gist tokens: the masked model hides an image from all that stands behind its run of them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tests.laws.cases import FAMILIES, inputs_of, logits_of, model_of
from tests.laws.masked import _models_own as models_own
from tests.laws.oracle import language_model
from tests.laws.test_flash import flash as flash
from tests.laws.test_law09_generation_modes import MODES, generate
from tests.laws.test_law10_training import (
    assert_equal,
    backward,
    checkpointing,
    labels_of,
    training,
)
from tests.laws.test_merged_features import merged
from tests.laws.windows import MODELS, windowed
from tests.laws.windows import SAMPLES as WINDOWED_SAMPLES
from tests.tiny import (
    GIST,
    Image,
    Sample,
    Text,
    Video,
    build,
    gist_tokens,
    make_inputs,
    visual_positions,
)
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from vispress import compress_model, compressed, remove_compression
from vispress.errors import ConfigError, UnsupportedModelError
from vispress.methods import CMAI, AttendedCache, DivPrune, FastV, VoCo
from vispress.runtime.kv_cache.hf_compat import CACHE, cache_of

EXACT = 1e-5


@pytest.fixture(autouse=True)
def _gists() -> Iterator[None]:
    with gist_tokens():
        yield


def last_seen(family: str, model: Any, inputs: Mapping[str, Any], hide: str) -> Tensor:
    """`[B, L]`: the last position that sees each token of a prompt, worked out by hand."""
    ids, real = inputs["input_ids"].tolist(), inputs["attention_mask"].tolist()
    found = torch.full((len(ids), len(ids[0])), 10**6)
    images = visual_positions(family, model, dict(inputs))
    for b, row in enumerate(ids):
        ends = []
        for image in images[b]:
            places = image.tolist()
            at = places[-1] + 1
            while row[at] != GIST:
                at += 1
            while at + 1 < len(row) and row[at + 1] == GIST:
                at += 1
            ends.append(at)
            for place in places:
                found[b, place] = at
        if hide == "prefix" and ends:
            for place in range(row.index(GIST)):
                if real[b][place] and found[b, place] == 10**6:
                    found[b, place] = ends[0]
    return found


@contextmanager
def hiding_model(
    model: Any, seen: Tensor, real: Tensor, alive: Sequence[Tensor] = ()
) -> Iterator[None]:
    """Inside, `model` attends to what its mask shows, but no further than rows that see it last.

    Args:
        model: Not compressed.
        seen: `[B, L]`, for the prompt; later tokens are seen by all.
        real: `[B, L]`, 0 on padding.
        alive: `[B, L]` a decoder layer, tokens that are not dropped.
    """
    stack = language_model(model)

    def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        (hidden,) = args
        cache = cache_of(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length(layer.self_attn.layer_idx))
        total, times = past + hidden.shape[1], hidden.shape[0] // len(seen)
        more = max(0, total - seen.shape[1])
        until = torch.nn.functional.pad(seen, (0, more), value=10**6).repeat_interleave(times, 0)
        live = alive[layer.self_attn.layer_idx] if alive else real
        valid = torch.nn.functional.pad(live.bool(), (0, more), value=True)
        valid = valid.repeat_interleave(times, 0)
        at, keys = torch.arange(past, total)[:, None], torch.arange(total)
        seen_yet = (at <= until[:, None, :total]) & valid[:, None, :total]
        own, first = models_own(kwargs["attention_mask"], past, total)
        allow = (own & seen_yet[:, None, :, first:]) | (keys[first:] == at)
        if stack.config._attn_implementation == "eager":
            least = torch.finfo(hidden.dtype).min
            allow = torch.zeros(allow.shape, dtype=hidden.dtype).masked_fill(~allow, least)
        return args, kwargs | {"attention_mask": allow}

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in stack.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.some(cases=8)
@pytest.mark.parametrize("hide", ["visual", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefill_and_decoding_equal_the_whole_masked_sequence(family: str, hide: str) -> None:
    """Two images and one, a row without, padded on the left; the oracle keeps no cache."""
    model, inputs = model_of(family), inputs_of(family)
    seen, real = last_seen(family, model, inputs, hide), inputs["attention_mask"]
    with hiding_model(model, seen, real):
        expected = logits_of(model, inputs)
        whole = generate(model, inputs, use_cache=False)
    plain = logits_of(model, inputs)
    with compressed(model, VoCo(hide=hide)):
        got = logits_of(model, inputs)
        steps = generate(model, inputs)
    assert (got - expected)[real.bool()].abs().max() < EXACT
    assert (plain - expected)[real.bool()].abs().max() > 1e-2
    assert torch.equal(steps.sequences, whole.sequences)
    assert (torch.stack(steps.logits) - torch.stack(whole.logits)).abs().max() < EXACT


def test_tiles_of_one_picture_have_one_run() -> None:
    model = model_of("internvl")
    inputs = make_inputs("internvl", [Sample([Text(5), Image(16, 8), Text(4), Image(), Text(3)])])
    assert len(visual_positions("internvl", model, inputs)[0]) == 4
    with hiding_model(
        model, last_seen("internvl", model, inputs, "visual"), inputs["attention_mask"]
    ):
        expected = logits_of(model, inputs)
    with compressed(model, "voco"):
        got = logits_of(model, inputs)
    assert (got - expected).abs().max() < EXACT


def test_an_image_right_behind_a_run_has_its_own() -> None:
    """No text stands between the first picture's gist token and the second picture."""
    model = model_of("llava")
    inputs = make_inputs("llava", [Sample([Text(5), Image(), Image(), Text(4)])])
    first, second = visual_positions("llava", model, inputs)[0]
    assert int(second[0]) == int(first[-1]) + 2
    seen = last_seen("llava", model, inputs, "visual")
    assert seen[0, second[0]] > seen[0, first[0]]
    with hiding_model(model, seen, inputs["attention_mask"]):
        expected = logits_of(model, inputs)
    with compressed(model, "voco"):
        got = logits_of(model, inputs)
    assert (got - expected).abs().max() < EXACT


@pytest.mark.parametrize("name", ["mistral", "qwen2", "gpt_oss"])
def test_windows_and_sinks_of_the_model_are_kept(name: str) -> None:
    """In training, which has no cache, and in one that grows."""
    model = windowed(name, 20)
    family = MODELS[name][0]
    inputs = make_inputs(family, WINDOWED_SAMPLES, padding="left")
    with hiding_model(model, last_seen(family, model, inputs, "visual"), inputs["attention_mask"]):
        expected = logits_of(model, inputs | {"use_cache": False})
    real = inputs["attention_mask"].bool()
    with compressed(model, "voco"):
        got = logits_of(model, inputs | {"use_cache": False})
        assert (got - expected)[real].abs().max() < EXACT
        kept = logits_of(model, inputs | {CACHE: DynamicCache()})
        assert (kept - expected)[real].abs().max() < EXACT
        with pytest.raises(UnsupportedModelError, match="fixed number of tokens"):
            logits_of(model, inputs | {CACHE: DynamicCache(config=model.config.get_text_config())})


@pytest.mark.parametrize("mode", [name for name in MODES if "static" not in name])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_every_mode_of_generation_equals_the_masked_model(family: str, mode: str) -> None:
    model = model_of(family)
    samples = [Sample([Text(5), Image(), Text(4)]), Sample([Text(3)])]
    inputs = make_inputs(family, samples, padding="left")
    seen = last_seen(family, model, inputs, "visual")
    with hiding_model(model, seen, inputs["attention_mask"]):
        expected = generate(model, inputs, **MODES[mode])
    with compressed(model, "voco"):
        got = generate(model, inputs, **MODES[mode])
    assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("hide", ["visual", "prefix"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_several_tokens_either_padding_and_eager(attn: str, hide: str, padding: str) -> None:
    model = model_of("qwen3_vl", torch.float64, attn)
    with gist_tokens(3):
        inputs = inputs_of("qwen3_vl", padding)
    assert int((inputs["input_ids"] == GIST).sum()) == 9
    with hiding_model(model, last_seen("qwen3_vl", model, inputs, hide), inputs["attention_mask"]):
        expected = logits_of(model, inputs)
    with compressed(model, "voco", hide=hide) as report:
        got = logits_of(model, inputs)
        assert any("voco: 9 tokens of the prompt stand for its images" in n for n in report.notes)
    assert (got - expected)[inputs["attention_mask"].bool()].abs().max() < EXACT


@pytest.mark.some(cases=6)
@pytest.mark.parametrize("again", [None, True, False], ids=["once", "reentrant", "not reentrant"])
@pytest.mark.parametrize("hide", ["visual", "prefix"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_losses_and_gradients_are_those_of_the_masked_model(
    family: str, hide: str, again: bool | None
) -> None:
    """Of one pass over prompt and answer; layers that a checkpoint runs again hide the same."""
    model, inputs = model_of(family), inputs_of(family)
    labels = labels_of(inputs)
    seen = last_seen(family, model, inputs, hide)
    with training(model), hiding_model(model, seen, inputs["attention_mask"]):
        loss = model(**inputs, labels=labels).loss
        expected = backward(model, loss)
    layers = nullcontext() if again is None else checkpointing(model, reentrant=again)
    with training(model), compressed(model, "voco", hide=hide), layers:
        own = model(**inputs, labels=labels).loss
        got = backward(model, own)
    assert abs(own - loss) < 1e-9
    assert_equal(got, expected)
    word = next(g for name, g in got.items() if name.endswith("embed_tokens.weight"))[GIST]
    assert word.abs().max() > 1e-4  # the answer's loss reaches the word that is to be learned


@pytest.mark.parametrize(("hide", "left"), [("visual", 5 + 3), ("prefix", 3)])
def test_images_leave_the_cache_of_every_layer(hide: str, left: int) -> None:
    model = model_of("llava")
    inputs = make_inputs("llava", [Sample([Text(5), Image(), Text(2)])])
    cache = DynamicCache()
    with compressed(model, "voco", hide=hide) as report, torch.no_grad():
        model(**inputs, **{CACHE: cache})
        assert {layer.keys.shape[2] for layer in cache.layers} == {left}
        assert report.kv_bytes == sum(2 * layer.keys.nbytes for layer in cache.layers)
        places = list(report.samples[0].images[0].positions)
        assert not any(report.cached(i)[:, :, places].any() for i in range(report.num_layers))
    # layers with equal slots share what is known of them
    assert len({id(layer.slots) for layer in cache.layers}) == 1


@pytest.mark.parametrize("words", [4, 5])
def test_later_turns_see_what_is_cached_and_bring_images_of_their_own(words: int) -> None:
    """The second one begins with a word, or with its image."""
    model = model_of("llava")
    samples = [Sample([Text(5), Image(), Text(4), Image(), Text(3)])]
    whole = make_inputs("llava", samples)
    first = visual_positions("llava", model, whole)[0][0][-1] + 1 + words
    names = ("input_ids", "attention_mask")
    turns = [{k: whole[k][:, a:b] for k in names} for a, b in ((None, first), (first, None))]
    turns[1]["attention_mask"] = whole["attention_mask"]
    pixels = whole["pixel_values"].split(1)
    with hiding_model(model, last_seen("llava", model, whole, "prefix"), whole["attention_mask"]):
        expected = logits_of(model, whole)
    cache, found = DynamicCache(), []
    with compressed(model, "voco", hide="prefix"), torch.no_grad():
        for turn, seen in zip(turns, pixels, strict=True):
            found.append(model(**turn, pixel_values=seen, **{CACHE: cache}).logits)
    assert (torch.cat(found, 1) - expected).abs().max() < EXACT


@pytest.mark.parametrize("told", ["lengths", "labels"])
def test_gist_tokens_that_a_model_answers_stand_for_nothing(told: str) -> None:
    """Right behind the run, or later: as in decoding, where they are words like others."""
    model = model_of("llava")
    prompt = make_inputs("llava", [Sample([Text(5), Image()])])
    answer, length = torch.tensor([[GIST, 40, GIST]]), prompt["input_ids"].shape[1]
    ids = torch.cat([prompt["input_ids"], answer], dim=1)
    whole = prompt | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seen = torch.nn.functional.pad(last_seen("llava", model, prompt, "visual"), (0, 3), value=99)
    with hiding_model(model, seen, whole["attention_mask"]):
        expected = logits_of(model, whole)
    labels = ids.masked_fill(torch.arange(length + 3) < length, -100)
    more = {"labels": labels} if told == "labels" else {"prompt_lengths": [length]}
    with compressed(model, "voco"):
        got = logits_of(model, whole | more)
    assert (got - expected).abs().max() < EXACT


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_chain_prunes_what_gist_tokens_then_stand_for(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    with compressed(model, [DivPrune(keep_ratio=0.5), VoCo()], positions="original") as report:
        got = generate(model, inputs)
        length = inputs["input_ids"].shape[1]
        alive = [report.alive(i)[:, :length] for i in range(report.num_layers)]
    seen = last_seen(family, model, inputs, "visual")
    with hiding_model(model, seen, inputs["attention_mask"], alive):
        expected = generate(model, inputs)
    assert (torch.stack(got.logits) - torch.stack(expected.logits)).abs().max() < EXACT


def test_prompts_without_images_and_images_that_are_masked_are_as_ever() -> None:
    model = model_of("llava")
    text = make_inputs("llava", [Sample([Text(9)])])
    text["input_ids"][0, 3] = GIST
    dummy = make_inputs("llava", [Sample([Text(5), Image(), Text(6)])])
    dummy["attention_mask"] = (dummy["input_ids"] != GIST).long()
    dummy["attention_mask"][:, visual_positions("llava", model, dummy)[0][0]] = 0
    for inputs in (text, dummy):
        plain = logits_of(model, inputs)
        with compressed(model, "voco"):
            got = logits_of(model, inputs)
        real = inputs["attention_mask"].bool()
        assert torch.equal(got[real], plain[real])


def prompts() -> dict[str, list[int]]:
    """Ids of prompts with misplaced tokens; 1000 stands for an image's placeholders."""
    return {
        "image 0 of row 0 has no token 127 behind it; put one run": [5, 6, 1000, 7, 8],
        "tokens 127 in front of its end": [5, GIST, 1000, 7, 8],
        "tokens 127 behind it in several runs": [5, 1000, GIST, 7, GIST, 8],
        "no token 127 behind it": [5, 1000, 6, 1000, GIST, 8],
    }


@pytest.mark.refusal
@pytest.mark.parametrize("rule", prompts())
def test_prompts_with_misplaced_tokens_are_refused(rule: str) -> None:
    model, alone = model_of("llava"), make_inputs("llava", [Sample([Image()])])
    image = alone["input_ids"][0, :-1].tolist()
    ids = [x for word in prompts()[rule] for x in (image if word == 1000 else [word])]
    pixels = alone["pixel_values"].repeat(prompts()[rule].count(1000), 1, 1, 1)
    with compressed(model, "voco"), pytest.raises(ConfigError, match=rule):
        model(input_ids=torch.tensor([ids]), pixel_values=pixels)


@pytest.mark.refusal
def test_what_cannot_be_is_refused() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    with pytest.raises(ConfigError, match=r"call model.resize_token_embeddings\(129\)"):
        compress_model(model, "voco", token_id=128)
    with pytest.raises(ConfigError, match="placeholder of visual tokens"):
        compress_model(model, "voco", token_id=120)
    with pytest.raises(ConfigError, match="voco and voco both have tokens that stand for images"):
        compress_model(model, [VoCo(), VoCo(hide="prefix")])
    for other in (CMAI(layer=2), AttendedCache(keep_ratio=0.5)):
        with pytest.raises(ConfigError, match="needs visual tokens in the KV cache"):
            compress_model(model, [other, VoCo()])
    with pytest.raises(ConfigError, match="fastv ranks image tokens by the attention of rows"):
        compress_model(model, [FastV(keep_ratio=0.5, layer=2), VoCo()])
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=96)
    with compressed(model, "voco"), pytest.raises(UnsupportedModelError, match="fixed number"):
        model(**inputs, **{CACHE: static})
    text, cache = torch.full((3, 2), 9), DynamicCache()
    with compressed(model, "voco", hide="prefix"), torch.no_grad():
        model(input_ids=text, **{CACHE: cache})
        mask = torch.cat([torch.ones_like(text), inputs["attention_mask"]], dim=1)
        with pytest.raises(ConfigError, match="is in the KV cache already"):
            model(**inputs | {"attention_mask": mask}, **{CACHE: cache})


@pytest.mark.refusal
@pytest.mark.usefixtures("flash")
def test_flash_attention_goes_on_from_the_cache_and_is_refused_in_one_pass() -> None:
    model = model_of("llava")
    inputs = make_inputs("llava", [Sample([Text(5), Image(), Text(4)])])
    with compressed(model, "voco"):
        expected = logits_of(model, inputs)
    config, stop = model.config.get_text_config(), inputs["input_ids"].tolist()[0].index(GIST) + 1
    before = config._attn_implementation
    compress_model(model, "voco")
    try:
        config._attn_implementation = "flash_emulated"
        with pytest.raises(UnsupportedModelError, match="dense mask, and 'flash_emulated' takes"):
            logits_of(model, inputs)
        cache, ids = DynamicCache(), inputs["input_ids"]
        with torch.no_grad():
            given = {"pixel_values": inputs["pixel_values"], CACHE: cache}
            model(input_ids=ids[:, :stop], **given)
            got = model(input_ids=ids[:, stop:], **{CACHE: cache}).logits
    finally:
        config._attn_implementation = before
        remove_compression(model)
    assert (got - expected[:, stop:]).abs().max() < EXACT


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_embeddings_with_ids_beside_them_are_hidden_likewise(family: str) -> None:
    model = model_of(family)
    given = merged(family, inputs_of(family))
    with compressed(model, "voco"):
        got, pixels = logits_of(model, given), logits_of(model, inputs_of(family))
    assert (got - pixels)[given["attention_mask"].bool()].abs().max() < EXACT


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl"])
def test_a_video_has_one_run_behind_its_last_frame(family: str) -> None:
    """Qwen3-VL writes timestamps between frames: they are text, and stay."""
    model = model_of(family)
    inputs = make_inputs(family, [Sample([Text(3), Video(3, 4, 4), Text(4), Image(), Text(5)])])
    with hiding_model(model, last_seen(family, model, inputs, "visual"), inputs["attention_mask"]):
        expected = logits_of(model, inputs)
        answer = generate(model, inputs).sequences
    with compressed(model, "voco"):
        assert (logits_of(model, inputs) - expected).abs().max() < EXACT
        assert torch.equal(generate(model, inputs).sequences, answer)


@pytest.mark.slow
def test_a_new_word_learns_to_stand_for_pictures() -> None:
    """What two pictures are is told by their tokens of a word alone, behind which they are gone."""
    torch.manual_seed(0)
    model = build("llava", dtype=torch.float32, layers=2)
    with pytest.raises(ConfigError, match=r"call model.resize_token_embeddings\(131\)"):
        compress_model(model, "voco", token_id=130)
    model.resize_token_embeddings(131)
    with gist_tokens(2):
        sample = [Sample([Text(2), Image(), Text(3)])] * 2
        inputs = make_inputs("llava", sample, dtype=torch.float32)
    ids = inputs["input_ids"][:1].repeat(2, 1).where(inputs["input_ids"] != GIST, 130)
    ids[:, -1] = torch.tensor([30, 40])
    batch = {"input_ids": ids, "pixel_values": inputs["pixel_values"]}
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 1, -100)
    word = model.get_input_embeddings().weight
    before = word[130].detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with compressed(model, "voco", token_id=130):
        with training(model):
            for _ in range(40):
                loss = model(**batch, labels=labels).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        asked = {"input_ids": ids[:, :-1], "pixel_values": batch["pixel_values"].flip(0)}
        told = model.generate(**asked, max_new_tokens=1, do_sample=False)[:, -1]
    assert loss < 0.1
    assert (word[130] - before).abs().max() > 1e-3
    assert told.tolist() == [40, 30]
