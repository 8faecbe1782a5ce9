"""Law 13: the model's own mask is kept, whatever its layers see.

A compressed model equals the untouched one in whose own masks, as it makes them for the whole
sequence, the columns of dropped tokens are taken out: sliding windows of all lengths, sinks,
image tokens that see each other.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from tests.laws.cases import model_of, real_positions, run
from tests.laws.decoding import stepping
from tests.laws.masked import masked_model, with_valid
from tests.laws.oracle import extend, oracle_expand
from tests.laws.pairs import pair_masked
from tests.laws.test_flash import flash as flash
from tests.laws.test_law10_training import assert_equal, checkpointing, gradients, labels_of
from tests.laws.test_pair_masks import visual_of
from tests.laws.windows import (
    MODELS,
    NEW,
    WINDOWS,
    assert_same,
    batch,
    compressor_settings,
    expected_logits,
    full,
    generate,
    masking,
    window_of,
    windowed,
)
from tests.tiny import Image, Sample, Text, build, make_inputs
from tests.tiny_models import IMAGE_ID, WINDOWED
from torch import Tensor
from transformers import DynamicCache

from vispress import compressed
from vispress.config import make_compressor
from vispress.errors import UnsupportedModelError
from vispress.methods import CMAI
from vispress.methods.base import Compressor
from vispress.runtime.kv_cache.hf_compat import CACHE

EXACT = 1e-5
METHODS = (
    "divprune",
    "fastv",
    "pyramiddrop",
    "sparsevlm",
    "transprune",
    "dart",
    "scm",
    "visionzip",
    "lvlm_csp",
)
"""Of several ways through the runtime: before the LLM, by rows, by means, by the next layer's
attention, by a probe, by transitions, merging, bypassing."""
VIDEO_METHODS = ("framefusion", "dycoke", "fastv")
NAMES = tuple(name for name in MODELS if name != "video")

CASES = [
    (name, method)
    for name in MODELS
    for method in (VIDEO_METHODS if name == "video" else METHODS)
    if (name, method) != ("gemma3", "visionzip")  # its projector pools: no token goes through alone
]


def turning(cases: Sequence[tuple[Any, ...]], values: Sequence[Any], start: int = 0) -> list[Any]:
    """Every case with one of the values by default, in turn; with all in the full selection."""
    found = []
    for place, case in enumerate(cases, start):
        for number, value in enumerate(values):
            marks = () if number == place % len(values) else pytest.mark.full
            found.append(pytest.param(*case, value, marks=marks))
    return found


def make(name: str, method: str) -> Compressor:
    return make_compressor(method, **compressor_settings(name, method))


def close(got: Tensor, expected: Tensor, inputs: dict[str, Any]) -> bool:
    """Whether all logits of real positions agree."""
    real = inputs["attention_mask"].bool()
    return bool((got - expected)[real].abs().max() < EXACT)


@pytest.mark.some(cases=12)
@pytest.mark.parametrize(("name", "method", "window"), turning(CASES, WINDOWS))
def test_a_forward_without_a_cache_keeps_the_models_mask(
    name: str, method: str, window: str
) -> None:
    model, inputs = windowed(name, window_of(name, window)), batch(name)
    result = run(model, inputs | {"use_cache": False}, make(name, method))
    with torch.no_grad():
        assert close(result.logits, expected_logits(model, result, inputs), inputs)


@pytest.mark.some(cases=12)
@pytest.mark.parametrize(("name", "method", "window"), turning(CASES, WINDOWS, 1))
def test_every_step_keeps_the_models_mask(name: str, method: str, window: str) -> None:
    model, inputs = windowed(name, window_of(name, window)), batch(name)
    result = run(model, real_positions(MODELS[name][0], inputs), make(name, method))
    steps = stepping(model, make(name, method), result.report)
    with masking(model, result, inputs, steps):
        expected = generate(model, inputs, **full())
    with compressed(model, make(name, method)):
        got = generate(model, inputs)
    assert_same(got, expected)


WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "no_cache": {"use_cache": False},
}


@pytest.mark.some(cases=6)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_modes_of_generation_keep_the_models_mask(name: str, way: str) -> None:
    model = windowed(name, 20)
    # transformers 5.17 repeats images one by one: one in each sample
    inputs = make_inputs(
        MODELS[name][0], [Sample([Text(5), Image(), Text(9)]), Sample([Text(3)])], padding="left"
    )
    method = make(name, "divprune" if way == "no_cache" else "fastv")
    result = run(model, real_positions("llava", inputs), method)
    with masking(model, result, inputs):
        expected = generate(model, inputs, **WAYS[way], **({} if way == "no_cache" else full()))
    with compressed(model, method):
        got = generate(model, inputs, **WAYS[way])
    assert_same(got, expected)


@pytest.mark.parametrize("name", MODELS)
def test_any_dynamic_cache_gives_the_same(name: str) -> None:
    """Layers without windows (`DynamicCache()`) hold more and give no less."""
    model, inputs = windowed(name, 20), batch(name)
    with compressed(model, make(name, "fastv")):
        given = {CACHE: DynamicCache(config=model.config.get_text_config())}
        answers = [generate(model, inputs, **more) for more in ({}, given, full())]
    assert_same(answers[1], answers[0])
    assert_same(answers[2], answers[0])


def second_turn(ids: Tensor, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """What is fed behind an answer: the whole conversation, with the pixels of the second turn."""
    given = dict(second) | {"input_ids": torch.cat([ids, second["input_ids"]], dim=1)}
    ones = torch.ones_like(given["input_ids"][:, first["input_ids"].shape[1] :])
    given["attention_mask"] = torch.cat([first["attention_mask"], ones], dim=1)
    if "token_type_ids" in first:
        blank = first["token_type_ids"].new_zeros(len(ids), NEW)
        kinds = [first["token_type_ids"], blank, second["token_type_ids"]]
        given["token_type_ids"] = torch.cat(kinds, dim=1)
    return given


def two_turns(model: Any, first: dict[str, Any], second: dict[str, Any], cache: Any) -> Any:
    """The second answer of a conversation on one cache."""
    ids = generate(model, first, **{CACHE: cache}).sequences
    return generate(model, second_turn(ids, first, second), **{CACHE: cache})


@pytest.mark.some(cases=6)
@pytest.mark.parametrize(
    ("name", "method", "window"), turning([*product(NAMES, ("divprune", "fastv", "dart"))], (8, 40))
)
def test_a_second_turn_of_text_keeps_the_models_mask(name: str, method: str, window: int) -> None:
    model, inputs = windowed(name, window), batch(name)
    more = make_inputs(MODELS[name][0], [Sample([Text(5)])] * len(inputs["input_ids"]))
    result = run(model, real_positions("llava", inputs), make(name, method))
    with masking(model, result, inputs):
        expected = two_turns(model, inputs, more, DynamicCache())
    with compressed(model, make(name, method)):
        text = model.config.get_text_config()
        assert_same(two_turns(model, inputs, more, DynamicCache(config=text)), expected)


FIRST = {
    "text": [Sample([Text(30)]), Sample([Text(21)])],
    "image": [Sample([Text(5), Image(), Text(9)]), Sample([Text(3)])],
}
"""First turns: plain layers that become short ones later, and short ones that grow on."""


@pytest.mark.some(cases=12)
@pytest.mark.parametrize(
    ("name", "method", "turn"),
    turning(
        [*product(NAMES, ("divprune", "fastv", "dart", "scm", "lvlm_csp"))],
        [*product(FIRST, (8, 40))],
    ),
)
def test_an_image_behind_a_turn_keeps_the_models_mask(
    name: str, method: str, turn: tuple[str, int]
) -> None:
    model, family = windowed(name, turn[1]), MODELS[name][0]
    before = make_inputs(family, FIRST[turn[0]], padding="left")
    width = 16 if family == "gemma3" else 36  # beside the image, as much text: all its rows stay
    second = [Sample([Text(3), Image(), Text(6)]), Sample([Text(width + 9)])]
    image = make_inputs(family, second)
    cache = DynamicCache(config=model.config.get_text_config())
    with compressed(model, make(name, method)) as report:
        ids = generate(model, before, **{CACHE: cache}).sequences
        real = before["attention_mask"].bool()
        first = [real] * len(cache.layers)
        if turn[0] == "image":
            first = [report.alive(layer)[:, : real.shape[1]] for layer in range(len(first))]
        got = generate(model, second_turn(ids, before, image), **{CACHE: cache})
        alive = [report.alive(layer).clone() for layer in range(len(first))]
    sliding = [layer for layer in cache.layers if layer.is_sliding]  # a probe must not count there
    assert all(layer.keys.shape[2] == turn[1] - 1 for layer in sliding)
    for each, own in zip(alive, first, strict=True):  # what the windows had let go of by then
        each[:, : own.shape[1]] = own
        each[:, own.shape[1] : ids.shape[1]] = True
    real = extend(real, alive[0].shape[1] - real.shape[1], fill=True)
    assert (real & ~torch.stack(alive).all(dim=0)).any()
    with masked_model(model, with_valid(alive, real), make(name, method).default_positions):
        assert_same(got, two_turns(model, before, image, DynamicCache()))


@pytest.mark.some(cases=6)
@pytest.mark.parametrize(
    ("name", "method", "window"),
    turning([*product(NAMES, ("divprune", "fastv", "lvlm_csp"))], (8, 40)),
)
def test_training_keeps_the_models_mask(name: str, method: str, window: int) -> None:
    model, inputs = windowed(name, window), batch(name, "right")
    labels = labels_of(inputs)
    model.train()
    try:
        result = run(model, inputs | {"use_cache": False, "labels": labels}, make(name, method))
        with compressed(model, make(name, method)):
            loss = model(**inputs, labels=labels, use_cache=False).loss
            with checkpointing(model, reentrant=False):
                again = model(**inputs, labels=labels).loss
                checkpointed = gradients(model, again)
        got = gradients(model, loss)
        logits = expected_logits(model, result, inputs)
        vocab = model.config.get_text_config().vocab_size
        expected_loss = model.loss_function(logits=logits, labels=labels, vocab_size=vocab)
        expected = gradients(model, expected_loss)
    finally:
        model.eval()
    assert abs(loss - expected_loss) < EXACT
    assert_equal(checkpointed, got)
    assert_equal(got, expected, 1e-6 if name == "gemma3" else 1e-9)  # norms there are fp32


@pytest.mark.parametrize(
    ("name", "window"),
    turning([(n,) for n in ("mistral", "qwen2", "gemma3") if n in MODELS], (8, 20, 40)),
)
def test_masked_pairs_keep_the_models_mask(name: str, window: int) -> None:
    """A layer that masks pairs keeps every slot, since what it remembers counts them."""
    model, method = windowed(name, window), CMAI(mass=0.7)
    inputs = make_inputs(
        MODELS[name][0], [Sample([Text(5), Image(), Text(9)]), Sample([Text(3)])], padding="left"
    )
    inputs = real_positions("llava", inputs)
    result = run(model, inputs, method)
    with compressed(model, method):
        got = generate(model, {k: v for k, v in inputs.items() if k != "position_ids"})
    start = inputs["input_ids"].shape[1]
    for step in range(NEW):
        grown, alive = grow(inputs, got.sequences[:, start : start + step]), result.alive
        visual = extend(visual_of(result.report, inputs["input_ids"].shape), step, fill=False)
        first = method.placements(len(alive))[0].layer
        alive = [extend(each, step, fill=True) for each in alive]
        with (
            torch.no_grad(),
            masked_model(model, [*alive, grown["attention_mask"].bool()]),
            pair_masked(model, alive, visual, first, method.mass),
        ):
            expected = model(**grown, use_cache=False).logits[:, -1]
        assert (got.logits[step] - expected).abs().max() < EXACT


def grow(inputs: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """Model arguments with the tokens of an answer appended."""
    more = tokens.shape[1]
    grown = inputs | {"input_ids": torch.cat([inputs["input_ids"], tokens], dim=1)}
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
    grown |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    if "token_type_ids" in inputs:
        blank = inputs["token_type_ids"].new_zeros(len(tokens), more)
        grown["token_type_ids"] = torch.cat([inputs["token_type_ids"], blank], dim=1)
    return grown


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", [n for n in ("mistral", "gemma3") if n in MODELS])
def test_eager_masks_are_cut_too(name: str, padding: str) -> None:
    model = windowed(name, 20, torch.float32, "eager")
    inputs = batch(name, padding, torch.float32)
    result = run(model, inputs | {"use_cache": False}, make(name, "fastv"))
    with torch.no_grad():
        expected = expected_logits(model, result, inputs)
    real = inputs["attention_mask"].bool()
    assert (result.logits - expected)[real].abs().max() < 1e-3


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_that_sees_nothing_of_the_window_stays_finite(padding: str) -> None:
    """Eager attention works in fp32, where the least number of fp64 is an infinity."""
    found = []
    for attn in ("sdpa", "eager"):
        model, inputs = windowed("mistral", 20, attn=attn), batch("mistral", padding)
        with compressed(model, make("mistral", "divprune")), torch.no_grad():
            found.append(model(**inputs).logits[inputs["attention_mask"].bool()])
    assert found[1].isfinite().all()
    assert (found[1] - found[0]).abs().max() < EXACT


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("method", ["divprune", "fastv", "dart"])
@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_flash_is_exact_within_the_window_and_refused_beyond(name: str, method: str) -> None:
    """Its kernel counts the window in keys, which are no positions once tokens are dropped."""
    inputs = batch(name)
    length = inputs["input_ids"].shape[1]
    model = build("llava", text=WINDOWED[name] | {"sliding_window": length + NEW})
    config = model.model.language_model.config
    with compressed(model, make(name, method)):
        expected = generate(model, inputs)
        config._attn_implementation = "flash_emulated"
        assert_same(generate(model, inputs), expected)
    for window in (length - 1, length + 1):
        model = build("llava", text=WINDOWED[name] | {"sliding_window": window})
        model.model.language_model.config._attn_implementation = "flash_emulated"
        with compressed(model, make(name, method)):
            refusal = pytest.raises(UnsupportedModelError, match=f"window of {window} in keys")
            with refusal as caught:
                generate(model, inputs)
            assert f"the sequence has {window + 1 if window > length else length}" in str(
                caught.value
            )
            assert "'sdpa'" in str(caught.value)


def given_mask(kind: str, inputs: dict[str, Any]) -> Tensor:
    """`[B, 1, L, L]` bool that a caller may hand to a model with full attention."""
    real = inputs["attention_mask"].bool()
    at = torch.arange(real.shape[1])
    image = inputs["input_ids"] == IMAGE_ID
    causal = (at <= at[:, None])[None]
    seen = {
        # chunks apart would be packed documents
        "chunks": causal & ((at // 16 == (at // 16)[:, None]) | (at >= at[:, None] - 1))[None],
        "window": causal & (at > at[:, None] - 20)[None],
        "image tokens see each other": causal | (image[:, None] & image[:, :, None]),
        "half the heads": causal,
    }[kind]
    seen = (seen & real[:, None])[:, None]
    if kind == "half the heads":
        near = (at > at[:, None] - 9)[None, None]
        seen = torch.cat([seen, seen, seen & near, seen & near], dim=1)
    return seen


KINDS = ("chunks", "window", "image tokens see each other", "half the heads")


@pytest.mark.parametrize(
    ("kind", "method", "attn"),
    turning(
        [*product(KINDS, ("divprune", "fastv", "sparsevlm", "dart", "scm"))], ("sdpa", "eager")
    ),
)
def test_a_mask_of_the_callers_is_kept(kind: str, method: str, attn: str) -> None:
    """Llama 4 alone has chunks in transformers, and it is refused: chunks come as a mask here."""
    dtype = torch.float64 if attn == "sdpa" else torch.float32
    model = model_of("llava", dtype, attn)
    inputs = batch("mistral", "right", dtype)
    mask = given_mask(kind, inputs)
    if attn == "eager":
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    given = inputs | {"attention_mask": mask}
    result = run(model, given, make("mistral", method))
    with torch.no_grad(), masking(model, result, inputs):
        logits = model(**given, use_cache=False).logits
    expected = oracle_expand(logits, result.alive[-1])
    real = inputs["attention_mask"].bool()
    assert (result.logits - expected)[real].abs().max() < (EXACT if attn == "sdpa" else 1e-3)
