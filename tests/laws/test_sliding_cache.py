"""Cache layers of sliding windows: what they hold, report, take back, and refuse."""

from typing import Any

import pytest
import torch
from tests.laws.windows import MODELS, assert_same, batch, compressor_settings, generate, windowed
from tests.tiny import Image, Sample, Text, cache_by_prompts, make_inputs
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from vispress import compressed
from vispress.config import make_compressor
from vispress.errors import CompressionStateError, UnsupportedModelError
from vispress.runtime.kv_cache.hf_compat import CACHE
from vispress.runtime.kv_cache.slots import Slots

WINDOW = 20
NAMES = [name for name in MODELS if name != "video"]


def make(name: str, method: str) -> Any:
    return make_compressor(method, **compressor_settings(name, method))


@cache_by_prompts
def single(name: str) -> dict[str, Any]:
    return make_inputs(MODELS[name][0], [Sample([Text(4), Image(), Text(6)])])


def cache_for(model: Any) -> Any:
    return DynamicCache(config=model.config.get_text_config())


def feed(model: Any, tokens: torch.Tensor, held: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **{CACHE: held}).logits  # type: ignore[no-any-return]


@pytest.mark.some(cases=12)
@pytest.mark.parametrize("window", [3, WINDOW, 200])
@pytest.mark.parametrize("method", ["divprune", "fastv", "pyramiddrop", "lvlm_csp"])
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_holds_what_its_window_may_still_see(name: str, method: str, window: int) -> None:
    model, inputs = windowed(name, window), single(name)
    held, plain = cache_for(model), cache_for(model)
    with torch.no_grad():
        model(**inputs, **{CACHE: plain})
    with compressed(model, make(name, method)) as report:
        with torch.no_grad():
            model(**inputs, **{CACHE: held})
        alive = [report.alive(layer)[0] for layer in range(report.num_layers)]
        for step in range(4):
            check(held, plain, alive, step)
            token = torch.tensor([[7 + step]])
            feed(model, token, held)
            alive = [torch.cat([each, torch.ones(1, dtype=torch.bool)]) for each in alive]
            with_plain(model, token, plain)


def with_plain(model: Any, token: torch.Tensor, plain: Any) -> None:
    """Let the cache of the untouched model grow, too (what it computes does not matter)."""
    keys = torch.zeros(1, 2, 1, 16, dtype=torch.float64)
    for layer in plain.layers:
        layer.update(keys, keys)


def check(held: Any, plain: Any, alive: list[torch.Tensor], step: int) -> None:
    """Positions in the window alone, in memory of their own, and the sizes of a plain layer."""
    for layer, same, live in zip(held.layers, plain.layers, alive, strict=True):
        first = same.get_mask_sizes(1)[1]
        expected = [place for place in live.nonzero()[:, 0].tolist() if place >= first]
        assert layer.keys.shape[2] == layer.values.shape[2] == len(expected)
        assert layer.get_seq_length() == same.get_seq_length() == len(live)
        assert layer.get_mask_sizes(1) == same.get_mask_sizes(1)
        assert layer.get_mask_sizes(5) == same.get_mask_sizes(5)
        assert layer.is_sliding == same.is_sliding
        if hasattr(layer, "slots"):
            assert layer.slots.positions[0].tolist() == expected
        if step == 0 and hasattr(layer, "slots"):
            used = layer.keys.numel() * layer.keys.element_size()
            assert layer.keys.untyped_storage().nbytes() == used, "a view of the whole prefill"


@pytest.mark.parametrize("name", NAMES)
def test_positions_are_read_once_behind_a_prefill_and_never_while_decoding(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One copy to the host for all layers with the same rows; then they are counted."""
    model, inputs, reads = windowed(name, WINDOW), batch(name), []
    original = Slots.newest

    def newest(self: Slots) -> list[int]:
        if self._newest is None:
            reads.append(self)
        return original(self)

    monkeypatch.setattr(Slots, "newest", newest)
    with compressed(model, make(name, "fastv")):
        generate(model, inputs)
    assert len(reads) == 1


@pytest.mark.some(cases=6)
@pytest.mark.parametrize("window", [8, 40, 200])
@pytest.mark.parametrize("name", NAMES)
def test_prompt_lookup_takes_back_what_it_guessed(name: str, window: int) -> None:
    model = windowed(name, window)
    inputs = make_inputs(MODELS[name][0], [Sample([Text(6), Image(), Text(8)])])
    with compressed(model, make(name, "divprune")):
        expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        got = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3
        )
    assert torch.equal(got, expected)


def test_a_cut_that_a_window_cannot_undo_is_refused() -> None:
    model, inputs = windowed("mistral", 4), single("mistral")  # of the prompt, text alone is held
    for recorded in (False, True):
        held = cache_for(model)
        if recorded:
            held.activate_past_recording()
        with compressed(model, "divprune", keep_ratio=0.4), torch.no_grad():
            model(**inputs, **{CACHE: held})
            if not recorded:
                with pytest.raises(CompressionStateError, match="activate_past_recording"):
                    held.crop(-1)
                continue
            expected = feed(model, torch.tensor([[9]]), held)
            held.crop(-1)
            assert held.get_seq_length() == inputs["input_ids"].shape[1]
            feed(model, torch.tensor([[11, 12, 13]]), held)
            held.crop(-3)
            assert all(len(layer.newest) == layer.keys.shape[2] for layer in held.layers)
            assert torch.equal(feed(model, torch.tensor([[9]]), held), expected)


def test_a_cut_within_the_window_needs_no_record() -> None:
    model, inputs = windowed("mistral", 200), single("mistral")
    held = cache_for(model)
    with compressed(model, "divprune", keep_ratio=0.4), torch.no_grad():
        model(**inputs, **{CACHE: held})
        expected = feed(model, torch.tensor([[9]]), held)
        held.crop(-1)
        assert torch.equal(feed(model, torch.tensor([[9]]), held), expected)
        with pytest.raises(CompressionStateError, match="visual tokens were dropped"):
            held.crop(-20)


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_a_cache_is_forgotten_repeated_and_selected(name: str) -> None:
    model, inputs = windowed(name, WINDOW), single(name)
    held, token = cache_for(model), torch.tensor([[9]])
    with compressed(model, make(name, "fastv")), torch.no_grad():
        expected = model(**inputs, **{CACHE: held}).logits
        held.reset()
        assert torch.equal(model(**inputs, **{CACHE: held}).logits, expected)
        held.batch_repeat_interleave(3)
        three = feed(model, token.expand(3, 1), held)
        held.batch_select_indices(torch.tensor([1]))
        assert torch.equal(three[:1], three[1:2])
        one = feed(model, token, held)
        held.reset()
        model(**inputs, **{CACHE: held})
        assert (feed(model, token, held) - three[:1]).abs().max() < 1e-9
        assert (feed(model, token, held) - one).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_a_static_cache_with_windows_is_refused_before_anything_runs(name: str) -> None:
    model, inputs, ran = windowed(name, WINDOW), single(name), []
    layer = model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with compressed(model, "fastv", keep_ratio=0.4):
            held = StaticCache(config=model.config.get_text_config(), max_cache_len=100)
            refusal = pytest.raises(UnsupportedModelError, match="StaticSlidingWindowLayer")
            with refusal as caught:
                model(**inputs, **{CACHE: held})
            assert "DynamicCache()" in str(caught.value)
            with pytest.raises(UnsupportedModelError, match="DynamicCache"):
                generate(model, inputs, cache_implementation="static")
    finally:
        hook.remove()
    assert not ran


def test_a_cache_that_forgets_what_the_model_sees_is_refused() -> None:
    inputs = single("mistral")
    for name, window, match in (
        ("mistral", WINDOW - 1, "holds 19 positions, and decoder layer 0 sees 20 positions"),
        ("qwen2", WINDOW, "holds 20 positions, and decoder layer 0 sees everything"),
    ):
        layers = [DynamicSlidingWindowLayer(sliding_window=window) for _ in range(6)]
        refusal = pytest.raises(UnsupportedModelError, match=match)
        with compressed(windowed(name, WINDOW), "fastv", keep_ratio=0.4), refusal:
            windowed(name, WINDOW)(**inputs, **{CACHE: Cache(layers=layers)})


def test_a_cache_with_a_longer_window_gives_the_same() -> None:
    model, inputs = windowed("mistral", WINDOW), batch("mistral")
    layers = [DynamicSlidingWindowLayer(sliding_window=WINDOW + 7) for _ in range(6)]
    with compressed(model, "fastv", keep_ratio=0.4):
        expected = generate(model, inputs)
        assert_same(generate(model, inputs, **{CACHE: Cache(layers=layers)}), expected)
