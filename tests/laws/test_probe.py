"""A probe reads what the untouched model attends to, and leaves nothing behind."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from tests.laws.cases import FAMILIES, Spy, inputs_of, logits_of, model_of
from tests.laws.test_law10_training import checkpointing
from tests.tiny import Image, Sample, Text, make_inputs, visual_positions
from torch import Tensor
from transformers import DynamicCache, StaticCache

from vispress import compress_model, compressed, compression_report, remove_compression
from vispress.budget import Budget
from vispress.errors import ConfigError
from vispress.methods import SCM, Uniform
from vispress.methods.base import Compressor, ScorePruner
from vispress.runtime.kv_cache.hf_compat import CACHE
from vispress.runtime.stages import probe as probing
from vispress.types import Placement, Queries, Signal, Stage, VisualTokens


def spied(model: Any, inputs: dict[str, Any], method: Any, **more: Any) -> tuple[Spy, Any]:
    """A compressed forward; what the method saw, and the output."""
    spy = Spy()
    compress_model(model, spy.watch(method))
    try:
        with torch.no_grad():
            out = model(**inputs, **more)
    finally:
        remove_compression(model)
    return spy, out


def attention_behind(
    family: str, inputs: dict[str, Any], layer: int, past: int = 0
) -> list[Tensor]:
    """For each image, the mean of the eager model's rows behind it (or its last one)."""
    # fp32: its masks hold the lowest number, which eager attention casts to fp32
    model = model_of(family, torch.float32, "eager")
    visual = visual_positions(family, model, inputs)
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions[layer].mean(1)
    found = []
    for b, images in enumerate(visual):
        valid = inputs["attention_mask"][b].nonzero()[:, 0]
        for own in images:
            rows = valid[valid > own[-1]]
            rows = rows if len(rows) else valid[-1:]
            found.append(maps[b][rows].mean(0)[own])
    return found


def same_sets(seen: list[Tensor], expected: list[Tensor]) -> None:
    assert len(seen) == len(expected)
    left = list(expected)
    for row in seen:
        near = [
            i for i, e in enumerate(left)
            if e.shape == row.shape and torch.allclose(e, row, rtol=0, atol=1e-6)
        ]  # fmt: skip
        assert near, "no image has these scores"
        left.pop(near[0])


@pytest.mark.some(cases=12)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_means_are_those_of_the_untouched_model(family: str, padding: str, attn: str) -> None:
    inputs = inputs_of(family, padding, torch.float32)
    for layers in (1, 2, 3):
        method = SCM(keep_ratio=0.5, probe_layers=layers)
        spy, _ = spied(model_of(family, torch.float32, attn), inputs, method)
        seen = [row for tokens, _ in spy.seen for row in tokens.mean_attention]
        same_sets(seen, attention_behind(family, inputs, layers - 1))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_an_image_with_nothing_behind_asks_by_its_last_token(family: str) -> None:
    samples = [Sample([Text(3), Image(), Text(2), Image()])]
    inputs = make_inputs(family, samples, dtype=torch.float32)
    if family == "qwen2_5_vl":  # its marks stand behind pictures: cut them off
        end = int(visual_positions(family, model_of(family), inputs)[0][-1][-1]) + 1
        cut = ("input_ids", "attention_mask", "mm_token_type_ids")
        inputs = {k: v[:, :end] if k in cut else v for k, v in inputs.items()}
    spy, _ = spied(model_of(family, torch.float32), inputs, SCM(keep_ratio=0.5))
    seen = [row for tokens, _ in spy.seen for row in tokens.mean_attention]
    same_sets(seen, attention_behind(family, inputs, 1))


@pytest.mark.parametrize("before", [Uniform(keep_ratio=0.5), SCM(keep_ratio=0.5)], ids=str)
def test_a_probe_in_a_chain_sees_what_is_left(before: Compressor) -> None:
    samples = [Sample([Text(3), Image(), Text(4)]), Sample([Text(9)])]
    inputs = make_inputs("llava", samples, padding="left", dtype=torch.float32)
    spy = Spy()
    chain = [before, spy.watch(SCM(keep_ratio=0.3))]
    model = model_of("llava", torch.float32)
    with compressed(model, chain, positions="original") as found:
        logits_of(model, inputs)
        first = list(found.report.samples[0].images[0].placements[0].kept)
    own = visual_positions("llava", model, inputs)[0][0]
    keep = torch.ones_like(inputs["input_ids"][0], dtype=torch.bool)
    keep[own] = False
    keep[own[first]] = True
    ids = torch.arange(inputs["input_ids"].shape[1])
    # the first sample alone, without what the first compressor dropped
    eager = model_of("llava", torch.float32, "eager")
    embeds: list[Tensor] = []
    handle = eager.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    logits_of(eager, inputs)
    handle.remove()
    valid = keep & inputs["attention_mask"][0].bool()
    with torch.no_grad():
        maps = eager.model.language_model(
            inputs_embeds=embeds[0][:1, valid],
            position_ids=ids[None, valid],
            output_attentions=True,
        ).attentions[1]
    left = ids[valid]
    expected = maps[0].mean(0)[left > own[-1]].mean(0)[(left[:, None] == own[first]).any(1)]
    (tokens, _), = spy.seen  # fmt: skip
    torch.testing.assert_close(tokens.mean_attention[0], expected, rtol=0, atol=1e-6)


def snapshot(cache: Any) -> list[Any]:
    """Kinds, lengths and tensors of a cache."""
    return [
        (type(layer), layer.get_seq_length(), [None if t is None else t.clone() for t in pair])
        for layer in cache.layers
        for pair in [(layer.keys, layer.values)]
    ]


def same_cache(before: list[Any], after: list[Any]) -> bool:
    return len(before) == len(after) and all(
        a[:2] == b[:2] and all(x is y or torch.equal(x, y) for x, y in zip(a[2], b[2], strict=True))
        for a, b in zip(before, after, strict=True)
    )


# a static cache that holds a plain turn is refused: another test
@pytest.mark.parametrize(
    ("first", "kind"), [(Text(5), "dynamic"), (Image(), "dynamic"), (Image(), "static")]
)
def test_a_later_turn_sees_the_cached_past_and_stores_nothing(
    first: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llava", torch.float32)
    one, two = (
        make_inputs("llava", [Sample([Text(2), part, Text(3)])], dtype=torch.float32)
        for part in (first, Image())
    )
    cache: Any = DynamicCache()
    if kind == "static":
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=96)
    before: list[bool] = []
    original = probing.probe

    def watched(state: Any, *args: Any) -> None:
        held = snapshot(state.cache)
        original(state, *args)
        before.append(same_cache(held, snapshot(state.cache)))

    monkeypatch.setattr(probing, "probe", watched)
    n, m = one["input_ids"].shape[1], two["input_ids"].shape[1]
    mask = torch.ones(1, n + m, dtype=torch.long)
    spy = Spy()
    compress_model(model, spy.watch(SCM(num_tokens=4)))
    try:
        with torch.no_grad():
            model(**one, **{CACHE: cache}, use_cache=True)
            turn = {**two, "attention_mask": mask, CACHE: cache, "use_cache": True}
            model(**turn)
        kept = compression_report(model).samples[0].images[0].num_kept
    finally:
        remove_compression(model)
    assert before == [True] * (1 if isinstance(first, Text) else 2)
    assert kept == 4
    if isinstance(first, Text):
        whole = {**two, "input_ids": torch.cat([one["input_ids"], two["input_ids"]], 1)}
        (expected,) = attention_behind("llava", {**whole, "attention_mask": mask}, 1)
        (tokens, _), = spy.seen  # fmt: skip
        torch.testing.assert_close(tokens.mean_attention[0], expected, rtol=0, atol=1e-6)


def probes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Notes each probe."""
    seen: list[Any] = []
    original = probing.probe

    def watched(*args: Any) -> None:
        seen.append(args[1])
        original(*args)

    monkeypatch.setattr(probing, "probe", watched)
    return seen


def test_nothing_is_probed_where_all_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = probes(monkeypatch)
    inputs = inputs_of("llava")
    for method in (SCM(keep_ratio=1.0), SCM(num_tokens=10_000)):
        spied(model_of("llava"), inputs, method)
    assert seen == []
    _, out = spied(model_of("llava"), inputs, SCM(keep_ratio=0.5), output_hidden_states=True)
    assert len(seen) == 1
    assert len(out.hidden_states) == model_of("llava").config.text_config.num_hidden_layers + 1


def test_a_checkpointed_step_probes_once_and_draws_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.tiny import build

    seen = probes(monkeypatch)
    model = build("llava", dtype=torch.float64).train()
    compress_model(model, SCM(keep_ratio=0.5))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    labels = inputs_of("llava")["input_ids"].clone()
    labels[:, :-2] = -100  # the last words are the answer, what stands before them asks
    with checkpointing(model, reentrant=False):
        model(**inputs_of("llava"), labels=labels).loss.backward()
    assert len(seen) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_in_a_probe_moves_no_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.tiny import build

    model, states = build("llava", dtype=torch.float64).train(), list[Tensor]()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    original = probing.probe

    def watched(*args: Any) -> None:
        states.append(torch.get_rng_state())
        original(*args)
        states.append(torch.get_rng_state())

    monkeypatch.setattr(probing, "probe", watched)
    with compressed(model, SCM(keep_ratio=0.5)):
        model(**inputs_of("llava"))
    before, after = states
    assert torch.equal(before, after)
    assert not torch.equal(after, torch.get_rng_state())  # as the layers themselves draw


@dataclass(frozen=True, kw_only=True)
class Asks(ScorePruner):
    """Asks for what cannot be had."""

    name: ClassVar[str] = "asks"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.MEAN_ATTENTION})

    placement: Placement

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (self.placement,)

    def score(self, tokens: VisualTokens) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class AsksForRows(Asks):
    """As `Asks`, for single rows."""

    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.QUERY_ATTENTION})


@pytest.mark.refusal
def test_what_a_probe_cannot_do_is_refused() -> None:
    model, half = model_of("llava"), Budget(keep_ratio=0.5)
    fine = Placement(stage=Stage.PRE_LLM, budget=half, queries=Queries.AFTER, probe=1)
    inside = replace(fine, stage=Stage.IN_LLM, layer=2)
    for bad in (replace(fine, probe=99), inside):
        with pytest.raises(ConfigError, match="a probe comes before the LLM"):
            compress_model(model, Asks(placement=bad))
    with pytest.raises(ConfigError, match="read as their mean alone"):
        compress_model(model, AsksForRows(placement=fine))


def test_the_report_and_the_table_say_that_a_probe_comes_first() -> None:
    from vispress.listing import method_markdown

    model = model_of("llava")
    with compressed(model, SCM(keep_ratio=0.5)) as found:
        logits_of(model, inputs_of("llava"))
        assert any("layers 0 to 1 run once more" in note for note in found.report.notes)
    row = next(line for line in method_markdown().splitlines() if "`scm`" in line)
    assert "after a probe of layers 0 to 1" in row
