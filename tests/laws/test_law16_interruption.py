"""Law 16: whatever ends a forward, at any module, the next call is a fresh model's, bit for bit."""

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from itertools import cycle
from typing import Any

import pytest
import torch
from tests.laws.cases import logits_of, make, model_of
from tests.tiny import Image, Sample, Text, build, cache_by_prompts, make_inputs
from torch import Tensor, nn
from transformers import DynamicCache

from vispress import compress_model, compressed, remove_compression
from vispress.adapters.base import find_adapter
from vispress.errors import CompressionStateError
from vispress.runtime.forward.model_call import LATEST
from vispress.runtime.hooks.no_checkpointing import NoCheckpointing
from vispress.runtime.kv_cache.hf_compat import CACHE

CASES = (
    ("llava", "tome"),
    ("llava", "lvlm_csp"),
    ("llava_next", "transprune"),
    ("llava_onevision", "fastv"),
    ("qwen2_vl", "scm"),
    ("qwen2_5_vl", "divprune"),
    ("qwen2_5_vl", "sparsevlm"),
    ("qwen3_vl", "pyramiddrop"),
    ("internvl", "visionzip"),
)
"""Every layout, and ways of every stage: encoder, before the LLM, in it, skip, pairs, probe."""
ENDS = (KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit)
PROMPT = (Sample([Text(5), Image(4, 4), Text(4)]), Sample([Text(2), Image(4, 4), Text(7)]))


@cache_by_prompts
def inputs_of(family: str, images: bool = True) -> dict[str, Any]:
    samples = PROMPT if images else (Sample([Text(9)]),) * 2
    return make_inputs(family, samples, padding="left" if images else None)


def decoder_alone(model: Any) -> Tensor:
    embeds = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        return model.model.language_model(inputs_embeds=embeds).last_hidden_state  # type: ignore[no-any-return]


def generated(model: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    out: Tensor = model.generate(
        **inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, **options
    )
    return out


def base_alone(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model.model(**inputs).last_hidden_state  # type: ignore[no-any-return]


def uncached(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits  # type: ignore[no-any-return]


ENTRIES: dict[str, Callable[[Any, dict[str, Any]], Tensor]] = {
    "forward": logits_of,
    "uncached": uncached,
    "base": base_alone,
    "generate": generated,
    "generate_uncached": lambda model, inputs: generated(model, inputs, use_cache=False),
}


def answers(model: Any, family: str) -> dict[str, Tensor]:
    """What calls of every kind give; what a dead call left behind would show in the first."""
    inputs, text = inputs_of(family), inputs_of(family, images=False)
    return {
        "decoder": decoder_alone(model),
        "text": logits_of(model, text),
        **{name: call(model, inputs) for name, call in ENTRIES.items()},
    }


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def places(model: Any) -> dict[str, nn.Module]:
    """Modules of every kind, where a call can be interrupted."""
    adapter = find_adapter(model)
    layers: Any = adapter.decoder_layers
    blocks = adapter.encoder_blocks()
    found = {
        "encoder attention": adapter.encoder_attentions()[0],
        "projector": adapter.projector,
        "norm": layers[0].input_layernorm,
        "first attention": layers[0].self_attn.q_proj,
        "behind an attention": layers[1].self_attn.o_proj,
        "MLP": layers[2].mlp,
        "queries": layers[3].self_attn.q_proj,
        "last MLP": layers[-1].mlp.down_proj,
        "last norm": adapter.language_model.norm,
        "head": model.lm_head,
    }
    if blocks:
        found["encoder MLP"] = blocks[0].mlp
    return found


@contextmanager
def interrupted_at(module: nn.Module, end: type[BaseException], *, call: int = 0) -> Iterator[None]:
    """Let the module's n-th call end in `end` before it has run."""
    calls = iter(range(10**6))

    def stop(*_: Any) -> None:
        if next(calls) == call:
            raise end

    handle = module.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def interrupt(
    model: Any, run: Callable[[Any, dict[str, Any]], Any], module: nn.Module,
    end: type[BaseException], inputs: dict[str, Any], **more: Any,
) -> bool:  # fmt: skip
    """Run a call into an interrupt; False where it ends before it reaches the module."""
    with interrupted_at(module, end, **more):
        try:
            run(model, inputs)
        except end:
            return True
    return False


def left_behind() -> dict[str, Any]:
    """Contexts of the runtime that still hold something."""
    return {
        variable.name: value
        for variable, value in copy_context().items()
        if variable.name.startswith("vispress_") and variable is not LATEST
        if (value() if isinstance(value, weakref.ref) else value)
    }


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize(("family", "method"), CASES)
def test_the_next_call_is_a_fresh_models(family: str, method: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    plain = answers(model, family)
    compressor = make(family, method)
    with compressed(model, compressor):
        expected = answers(model, family)
    ends, entries = cycle(ENDS), cycle(ENTRIES)
    with compressed(model, compressor):
        for place, module in places(model).items():
            for _ in range(2):
                entry, end = next(entries), next(ends)
                reached = interrupt(model, ENTRIES[entry], module, end, inputs)
                assert reached == (place != "head" or entry != "base"), (place, entry)
                assert left_behind() == {}
                found = {"decoder": decoder_alone(model)}
                text = inputs_of(family, images=False)
                found |= {"text": logits_of(model, text), entry: ENTRIES[entry](model, inputs)}
                wrong = differences(found, {name: expected[name] for name in found})
                assert not wrong, (place, entry, end.__name__)
        assert differences(answers(model, family), expected) == []
    # a last one, and the compression is taken off with nothing in between
    compress_model(model, compressor)
    assert interrupt(model, logits_of, places(model)["queries"], KeyboardInterrupt, inputs)
    remove_compression(model)
    assert differences(answers(model, family), plain) == []


@pytest.mark.some(cases=3)
@pytest.mark.parametrize(("family", "method"), CASES[:5])
def test_later_calls_of_a_generate_may_be_interrupted(family: str, method: str) -> None:
    """Also the calls of decoding, and those of generation without a cache."""
    model, inputs = model_of(family), inputs_of(family)
    with compressed(model, make(family, method)):
        expected = answers(model, family)
        for entry, end in zip(("generate", "generate_uncached"), ENDS, strict=False):
            for place in ("first attention", "queries", "MLP"):
                module = places(model)[place]
                assert interrupt(model, ENTRIES[entry], module, end, inputs, call=1)
                assert left_behind() == {}
        assert differences(answers(model, family), expected) == []


def test_two_models_do_not_meet_over_an_interrupt() -> None:
    first, second = model_of("llava"), model_of("qwen2_5_vl")
    with compressed(first, "transprune"), compressed(second, "fastv", keep_ratio=0.5):
        one, two = answers(first, "llava"), answers(second, "qwen2_5_vl")

        def nested(*_: Any) -> None:  # the second model is asked while the first runs
            logits_of(second, inputs_of("qwen2_5_vl"))

        handle = first.model.language_model.layers[2].register_forward_pre_hook(nested)
        try:
            for place in ("encoder attention", "queries", "head"):
                assert interrupt(
                    first, logits_of, places(second)[place], KeyboardInterrupt, inputs_of("llava")
                )
                assert left_behind() == {}
        finally:
            handle.remove()
        assert differences(answers(second, "qwen2_5_vl"), two) == []
        assert differences(answers(first, "llava"), one) == []


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize("method", ["fastv", "transprune", "tome"])
def test_nothing_of_the_call_is_kept_alive(method: str) -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    seen: list[weakref.ref[Any]] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(weakref.ref(hidden))

    layers = model.model.language_model.layers
    with compressed(model, make("llava", method)):
        handle = layers[2].register_forward_pre_hook(note, with_kwargs=True, prepend=True)
        for place in ("MLP", "queries", "encoder MLP"):
            interrupt(model, logits_of, places(model)[place], KeyboardInterrupt, inputs)
        handle.remove()
        gc.collect()
        assert seen
        assert [ref() for ref in seen] == [None] * len(seen)


def test_a_decoder_that_is_called_alone_may_be_interrupted() -> None:
    model = model_of("llava_next")
    with compressed(model, make("llava_next", "transprune")):
        expected = answers(model, "llava_next")
        for place in ("MLP", "last MLP"):
            at = interrupted_at(places(model)[place], KeyboardInterrupt)
            with at, pytest.raises(KeyboardInterrupt):
                decoder_alone(model)
        assert differences(answers(model, "llava_next"), expected) == []


@pytest.mark.parametrize("method", ["fastv", "divprune"])
@pytest.mark.parametrize("place", ["first attention", "queries", "last MLP"])
def test_a_cache_that_was_filled_in_part_is_refused(method: str, place: str) -> None:
    """Its layers disagree: plain transformers goes on with it, and answers wrongly."""
    model, inputs = build("llava"), inputs_of("llava")
    more = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": None}
    with compressed(model, method, keep_ratio=0.5), torch.no_grad():
        cache: Any = DynamicCache()
        model(**inputs, **{CACHE: cache})
        good = model(**more, **{CACHE: cache}).logits
        length = cache.get_seq_length()
        module = places(model)[place]
        with interrupted_at(module, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            model(**more, **{CACHE: cache})
        if cache.get_seq_length() == length:  # no layer has stored anything yet
            assert torch.isfinite(model(**more, **{CACHE: cache}).logits).all()
        elif place == "last MLP":  # all have
            assert cache.layers[-1].get_seq_length() == length + 1
        else:
            message = "part of an interrupted forward"
            with pytest.raises(CompressionStateError, match=message):
                model(**more, **{CACHE: cache})
        assert torch.isfinite(good).all()


def test_a_plain_model_does_not_take_what_was_expected_of_a_dead_call() -> None:
    model, inputs = build("llava"), inputs_of("llava")
    last = len(model.model.language_model.layers) - 1
    more = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": None}
    with torch.no_grad():
        compress_model(model, "fastv", keep_ratio=0.5, layer=last)  # one short layer
        cache: Any = DynamicCache()
        model(**inputs, **{CACHE: cache})
        queries: Any = model.model.language_model.layers[last].self_attn.q_proj
        with interrupted_at(queries, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            model(**more, **{CACHE: cache})
        remove_compression(model)
        with pytest.raises(CompressionStateError, match="does not know which tokens it holds"):
            model(**more, **{CACHE: cache})


def test_an_interrupted_compress_model_attaches_nothing() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    plain = logits_of(model, inputs)
    language_model = model.model.language_model

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    for name in ("register_forward_pre_hook", "register_forward_hook"):
        setattr(language_model, name, stop)
        try:
            with pytest.raises(KeyboardInterrupt):
                compress_model(model, "fastv", keep_ratio=0.5)
        finally:
            delattr(language_model, name)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(logits_of(model, inputs), plain)
    with compressed(model, "fastv", keep_ratio=0.5):
        assert not torch.equal(logits_of(model, inputs), plain)


def test_checkpointing_comes_back_after_any_end() -> None:
    layers = [nn.Linear(1, 1) for _ in range(3)]
    for layer in layers[:2]:
        layer.gradient_checkpointing = True  # type: ignore[assignment]
    paused = NoCheckpointing()

    def run(end: type[BaseException] | None) -> None:
        with paused(layers):
            assert not any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
            if end is not None:
                run(None)
                raise end

    for end in ENDS:
        with pytest.raises(end):
            run(end)
        assert [getattr(layer, "gradient_checkpointing", None) for layer in layers] == [
            True,
            True,
            None,
        ]
