"""Eviction behind the prefill: the masked model hides evicted keys once decoding begins."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from tests.laws.cases import FAMILIES, inputs_of, logits_of, model_of
from tests.laws.oracle import language_model
from tests.laws.test_law09_generation_modes import MODES, generate
from tests.tiny import Image, Sample, Text, make_inputs
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from vispress import compress_model, compressed, remove_compression
from vispress.budget import Budget
from vispress.errors import ConfigError, UnsupportedModelError
from vispress.methods import CMAI, AttendedCache, DivPrune, DyCoke, FastV, RandomMix
from vispress.methods.base import Compressor
from vispress.methods.cache_evictor import CachedTokens, CacheEvictor, CachePlan
from vispress.runtime.kv_cache.hf_compat import CACHE, cache_of
from vispress.types import Placement, Stage, TokenPlan, VisualTokens

METHODS = {
    "per_head": AttendedCache(keep_ratio=0.4),
    "shared": AttendedCache(num_tokens=5, per_head=False, layer=2),
    "behind_fastv": [FastV(keep_ratio=0.5, layer=2), AttendedCache(keep_ratio=0.5, layer=3)],
    "behind_and_before": [FastV(keep_ratio=0.5, layer=3), AttendedCache(keep_ratio=0.5)],
    "behind_divprune": [DivPrune(keep_ratio=0.5), AttendedCache(num_tokens=3)],
}


@dataclass(frozen=True, kw_only=True)
class Shares(CacheEvictor, Compressor):
    """Shares a budget unequally among layers, and keeps the first tokens."""

    name: ClassVar[str] = "shares"
    summary: ClassVar[str] = "more in later layers"
    paper: ClassVar[str] = "control"
    allocates: ClassVar[bool] = True

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.CACHE, budget=self.budget(num_layers)),)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        raise NotImplementedError

    def measure(self, tokens: CachedTokens) -> Tensor:
        return tokens.attention.flatten(1).sum(1)

    def allocate(self, measures: Sequence[Tensor], num_keep: int) -> list[list[int]]:
        images = len(measures[0])
        return [[num_keep - 2 + layer + row % 2 for row in range(images)] for layer in range(6)]

    def plan_cache(self, tokens: CachedTokens, num_keep: int) -> CachePlan:
        kept = torch.arange(num_keep).expand(len(tokens.index), 1, -1)
        return CachePlan(keep=kept.contiguous())


@dataclass(frozen=True, kw_only=True)
class Folds(CacheEvictor, Compressor):
    """Folds every evicted token into the first one."""

    name: ClassVar[str] = "folds"
    summary: ClassVar[str] = "evicted tokens join the first"
    paper: ClassVar[str] = "control"

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (Placement(stage=Stage.CACHE, budget=self.budget(num_layers)),)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        raise NotImplementedError

    def plan_cache(self, tokens: CachedTokens, num_keep: int) -> CachePlan:
        B, N = tokens.index.shape
        place = torch.arange(N).expand(B, 1, N)
        assign = place.masked_fill(place >= num_keep, 0)
        count = N - num_keep + 1.0
        weight = torch.ones(B, 1, N).masked_fill(assign == 0, 1 / count)
        return CachePlan(keep=place[..., :num_keep].contiguous(), assign=assign, weight=weight)


@contextmanager
def evicted_model(model: Any, alive: Sequence[Tensor], cached: Sequence[Tensor]) -> Iterator[None]:
    """Inside, rows behind the prompt attend to what is cached, those in it to what is alive."""
    stack = language_model(model)
    heads = model.config.get_text_config().num_attention_heads

    def hook_of(index: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            (hidden,) = args
            cache = cache_of(kwargs)
            past = 0 if cache is None else int(cache.get_seq_length(index))
            total, batch = past + hidden.shape[1], hidden.shape[0]
            prompt = alive[index].shape[1]
            times = batch // len(alive[index])
            seen = alive[index].repeat_interleave(times, 0)[:, None].expand(-1, heads, -1)
            held = cached[index].repeat_interleave(times, 0)
            held = held.repeat_interleave(heads // held.shape[1], 1)
            more = (batch, heads, max(0, total - prompt))
            seen, held = (torch.cat([x, x.new_ones(more)], 2)[..., :total] for x in (seen, held))
            at = torch.arange(past, total)[:, None]
            behind = (at >= prompt)[None, None]
            allow = torch.where(behind, held[:, :, None], seen[:, :, None])
            allow = allow & (torch.arange(total) <= at)
            itself = torch.arange(total) == at
            return args, kwargs | {"attention_mask": allow | itself}

        return hook

    handles = [
        layer.register_forward_pre_hook(hook_of(i), with_kwargs=True)
        for i, layer in enumerate(stack.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def facts(report: Any, inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What of the prompt is alive and cached; a report goes on to the conversation's end."""
    layers, length = range(report.num_layers), inputs["input_ids"].shape[1]
    cached = [report.cached(i)[..., :length] for i in layers]
    return [report.alive(i)[:, :length] for i in layers], cached


@pytest.mark.some(cases=10)
@pytest.mark.parametrize("chain", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_equals_the_masked_model(family: str, chain: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    with compressed(model, METHODS[chain], positions="original") as report:
        got = generate(model, inputs)
        alive, cached = facts(report, inputs)
    with evicted_model(model, alive, cached):
        expected = generate(model, inputs)
    assert torch.equal(got.sequences, expected.sequences)
    difference = torch.stack(got.logits, 1) - torch.stack(expected.logits, 1)
    assert difference.abs().max() < 1e-5
    assert any(not torch.equal(a, c.any(1)) for a, c in zip(alive, cached, strict=True))


@pytest.mark.parametrize("mode", [name for name in MODES if "static" not in name])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_every_mode_of_generation_equals_the_masked_model(family: str, mode: str) -> None:
    model = model_of(family)
    inputs = make_inputs(
        family, [Sample([Text(5), Image(), Text(4)]), Sample([Text(3)])], padding="left"
    )
    with compressed(model, AttendedCache(num_tokens=4)) as report:
        got = generate(model, inputs, **MODES[mode])
        alive, cached = facts(report, inputs)
    if mode == "no_cache":  # each step runs the prompt again: this one's facts are of the last
        alive, cached = facts_of_prompt(model, inputs)
    batch = len(inputs["input_ids"])
    alive, cached = [a[:: len(a) // batch] for a in alive], [c[:: len(c) // batch] for c in cached]
    with evicted_model(model, alive, cached):
        expected = generate(model, inputs, **MODES[mode])
    assert torch.equal(got.sequences, expected.sequences)


def facts_of_prompt(model: Any, inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    with compressed(model, AttendedCache(num_tokens=4)) as report, torch.no_grad():
        model(**inputs)
        return facts(report, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prefill_is_exact_and_the_cache_short(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    plain, cache = logits_of(model, inputs), DynamicCache()
    real = inputs["attention_mask"].bool()
    with compressed(model, AttendedCache(keep_ratio=0.4)) as report, torch.no_grad():
        got = model(**inputs, **{CACHE: cache}).logits
        images = [i for sample in report.samples for i in sample.images]
        assert (got - plain)[real].abs().max() < 1e-5
        left = [Budget(keep_ratio=0.4).resolve(i.num_visual) - i.num_visual for i in images]
        lost = torch.zeros(len(real), dtype=torch.long)
        for sample, gone in zip([0, 2, 2], left, strict=True):
            lost[sample] -= gone
        rows = int(max(real.sum(1) - lost))
        assert {layer.keys.shape[2] for layer in cache.layers} == {rows}
        keys = cache.layers[0].keys
        assert report.kv_bytes == 2 * 6 * keys.numel() * keys.element_size()
        assert all(image.num_kept == image.num_visual for image in images)
        assert any("of the visual tokens stay cached" in note for note in report.notes)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_batched_equals_alone(family: str) -> None:
    model = model_of(family)
    samples = [Sample([Text(5), Image(4, 4), Text(7)]), Sample([Text(2), Image(4, 6), Text(3)])]
    both = make_inputs(family, samples, padding="left")
    with compressed(model, AttendedCache(keep_ratio=0.4)):
        whole = torch.stack(generate(model, both).logits, 1)
        for row in range(2):
            one = make_inputs(family, samples, only=row)
            alone = torch.stack(generate(model, one).logits, 1)
            assert (alone[0] - whole[row]).abs().max() < 1e-9


def test_methods_that_allocate_and_that_merge() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    with compressed(model, Shares(num_tokens=6)) as report, torch.no_grad():
        cache = DynamicCache()
        model(**inputs, **{CACHE: cache})
        alive, cached = facts(report, inputs)
        got = generate(model, inputs)
    sizes = [layer.keys.shape[2] for layer in cache.layers]
    assert [b - a for a, b in pairwise(sizes)] == [2] * 5
    with evicted_model(model, alive, cached):
        expected = generate(model, inputs)
    assert torch.equal(got.sequences, expected.sequences)
    plain = DynamicCache()
    with torch.no_grad():
        model(**inputs, **{CACHE: plain})
        with compressed(model, Folds(num_tokens=6)):
            folded = DynamicCache()
            model(**inputs, **{CACHE: folded})
    (image,) = report.samples[0].images
    keys = plain.layers[3].keys[0, :, list(image.positions)]
    first = folded.layers[3].keys[0, :, -7 - 6]  # seven words stand behind six kept tokens
    torch.testing.assert_close(first, torch.cat([keys[:, :1], keys[:, 6:]], 1).mean(1))


def test_keeping_everything_changes_no_bit_and_removal_leaves_nothing() -> None:
    model, inputs = model_of("llava", torch.float32), inputs_of("llava", dtype=torch.float32)
    before = generate(model, inputs)
    with compressed(model, AttendedCache(keep_ratio=1.0)) as report:
        same = generate(model, inputs)
        assert any("every visual token stays cached" in note for note in report.notes)
    again = generate(model, inputs)
    for other in (same, again):
        assert torch.equal(torch.stack(before.logits), torch.stack(other.logits))


@pytest.mark.refusal
def test_what_cannot_be_is_refused() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    evicting = AttendedCache(keep_ratio=0.5)
    with pytest.raises(ConfigError, match="cmai needs all visual tokens in the KV cache"):
        compress_model(model, [CMAI(layer=2), evicting])
    with pytest.raises(ConfigError, match="there can be one in a chain"):
        compress_model(model, [evicting, AttendedCache(keep_ratio=0.3)])
    with pytest.raises(ConfigError, match=r"layer must be an integer in \[0, 6\)"):
        compress_model(model, AttendedCache(keep_ratio=0.5, layer=6))
    with pytest.raises(ConfigError, match=r"random_mix: .* needs a CacheEvictor"):
        compress_model(model, RandomMix(inner=evicting))  # it mixes plans, not what is cached
    compress_model(model, evicting)
    try:
        static = StaticCache(config=model.config.get_text_config(), max_cache_len=96)
        with pytest.raises(UnsupportedModelError, match="hold a fixed number of tokens"):
            model(**inputs, **{CACHE: static})
    finally:
        remove_compression(model)
    video = model_of("qwen2_5_vl")
    with pytest.raises(ConfigError, match="dycoke needs all visual tokens in the KV cache"):
        compress_model(video, [DyCoke(keep_ratio=0.5), evicting])


def test_a_later_turn_sees_what_is_cached() -> None:
    model = model_of("llava")
    inputs = make_inputs("llava", [Sample([Text(5), Image(), Text(4)])])
    turn, cache = torch.full((1, 3), 9), DynamicCache()
    with compressed(model, AttendedCache(num_tokens=4)) as report, torch.no_grad():
        model(**inputs, **{CACHE: cache})
        alive, cached = facts(report, inputs)
        got = model(input_ids=turn, **{CACHE: cache}).logits
    other = DynamicCache()
    with evicted_model(model, alive, cached), torch.no_grad():
        model(**inputs, **{CACHE: other})
        expected = model(input_ids=turn, **{CACHE: other}).logits
    assert (got - expected).abs().max() < 1e-5


def test_without_a_cache_the_report_says_what_answers_see() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    with compressed(model, AttendedCache(keep_ratio=0.5)) as report, torch.no_grad():
        model(**inputs, use_cache=False)
        assert any("no KV cache in this call; answers in it see" in note for note in report.notes)


@pytest.mark.parametrize("cached", [True, False])
def test_answers_in_one_call_see_what_later_tokens_would(cached: bool) -> None:
    model = model_of("llava")
    inputs = make_inputs("llava", [Sample([Text(5), Image(), Text(4)])])
    length, answer, cache = (
        inputs["input_ids"].shape[1],
        torch.tensor([[9, 40, 71]]),
        DynamicCache(),
    )
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    whole = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with compressed(model, AttendedCache(num_tokens=4)), torch.no_grad():
        model(**inputs, **{CACHE: cache})
        later = model(input_ids=answer, **{CACHE: cache}).logits
        together = model(**whole, prompt_lengths=[length], use_cache=cached).logits
    assert (together[:, length:] - later).abs().max() < 1e-9


def test_right_padding_leaves_with_what_is_evicted() -> None:
    model, found = model_of("llava"), []
    samples = [Sample([Text(5), Image(), Text(4)]), Sample([Text(2), Image(), Text(3)])]
    batch = make_inputs("llava", samples, padding="right")
    alone = [make_inputs("llava", samples, only=row) for row in range(2)]
    with compressed(model, AttendedCache(num_tokens=4)), torch.no_grad():
        for inputs in (batch, *alone):
            cache, mask = DynamicCache(), inputs["attention_mask"]
            model(**inputs, **{CACHE: cache})
            step = torch.full((len(mask), 1), 9)
            given = {"input_ids": step, "position_ids": mask.sum(1, keepdim=True), CACHE: cache}
            found.append(model(attention_mask=torch.cat([mask, step > 0], 1), **given).logits)
    assert (found[0] - torch.cat(found[1:])).abs().max() < 1e-9


def test_budgets_are_of_what_reaches_the_layer() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    with compressed(model, METHODS["behind_fastv"]) as report, torch.no_grad():
        model(**inputs)
        visual = report.samples[0].images[0].num_visual
        positions = torch.tensor(report.samples[0].images[0].positions)
    half = Budget(keep_ratio=0.5).resolve(visual)
    assert int(report.alive(3)[0, positions].sum()) == half
    counts = report.cached(4)[0, :, positions].sum(1)
    assert set(counts.tolist()) == {Budget(keep_ratio=0.5).resolve(half)}
