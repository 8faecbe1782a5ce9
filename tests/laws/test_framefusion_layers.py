"""Merging in several layers with a memory between them, and attention averaged over all queries."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from tests.laws.cases import logits_of, make, model_of, real_positions, run
from tests.laws.test_law01_prune_equals_mask import assert_equals_oracle
from tests.laws.test_law04_batched_equals_alone import assert_each_as_alone
from tests.laws.test_law10_training import backward, checkpointing, loss_of, training
from tests.tiny import FAMILIES, QWEN, VIDEO, Image, Sample, Text, Video, build, make_inputs
from torch import Tensor
from transformers import DynamicCache

from vispress import compress_model, compressed
from vispress.budget import Budget
from vispress.errors import ConfigError
from vispress.memory import Memory
from vispress.methods import FastV, FrameFusion
from vispress.methods.base import Compressor
from vispress.runtime.forward.attention_reads import AttentionRead
from vispress.runtime.kv_cache.hf_compat import CACHE
from vispress.types import Placement, Queries, Signal, Stage, TokenPlan, VisualTokens, full_index


def samples(family: str) -> list[Sample]:
    """Videos of different lengths, where the family takes such in one batch."""
    longer = Video(4 if family in QWEN else 3, 4, 6)
    return [
        Sample([Text(3), Video(3, 4, 4), Text(6)]),
        Sample([Text(2), longer, Text(3), Image(4, 4), Text(2)]),
        Sample([Text(4), Video(3, 4, 4), Text(5)]),
    ]


# so that random tokens are merged in every layer
MERGING: dict[str, Any] = {"keep_ratio": 0.6, "threshold": 0.3, "least": 0.0}


def merging(family: str) -> Compressor:
    return make(family, "framefusion", **MERGING)


@pytest.mark.parametrize("family", VIDEO)
def test_merging_in_several_layers_equals_the_masked_model(family: str) -> None:
    model, inputs = model_of(family), make_inputs(family, samples(family), padding="left")
    result = run(model, inputs, merging(family))
    assert_equals_oracle(model, inputs, result)
    report = result.report
    videos = [i for s in report.samples for i in s.images if i.modality == "video"]
    assert len(videos) == 3
    for video in videos:
        counts = [video.num_visual] * report.num_layers
        for place in video.placements:
            counts[place.layer :] = [place.num_kept] * (report.num_layers - place.layer)
        # what is merged is rounded down
        assert -3 <= sum(counts) - 0.6 * report.num_layers * video.num_visual <= report.num_layers


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", VIDEO)
def test_videos_of_different_lengths_are_what_they_are_alone(family: str, padding: str) -> None:
    singles = [make_inputs(family, samples(family), only=i) for i in range(3)]
    batch = make_inputs(family, samples(family), padding=padding)
    assert_each_as_alone(family, {"method": merging(family)}, batch, singles)


SHORT = [
    Sample([Text(3), Video(3, 4, 4), Text(6)]),
    Sample([Text(5), Video(3, 4, 4), Text(2)]),  # fewer than four words behind
    Sample([Text(4), Video(3, 4, 4)]),  # none: the last token asks, which is visual
]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_last_four_words_rank_in_a_batch_as_alone(padding: str) -> None:
    family = "qwen2_5_vl"
    method = make(family, "framefusion", keep_ratio=0.5, threshold=1.0, queries="last_four")
    singles = [make_inputs(family, SHORT, only=i) for i in range(3)]
    batch = make_inputs(family, SHORT, padding=padding)
    assert_each_as_alone(family, {"method": method}, batch, singles)
    assert_equals_oracle(model_of(family), batch, run(model_of(family), batch, method))


@pytest.mark.some(cases=4)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", VIDEO)
def test_checkpointing_repeats_what_was_decided(family: str, reentrant: bool) -> None:
    model, inputs = build(family), make_inputs(family, samples(family), padding="left")
    with training(model), compressed(model, merging(family)):
        expected = backward(model, loss_of(model, inputs))
        with checkpointing(model, reentrant=reentrant):
            got = backward(model, loss_of(model, inputs))
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() < 1e-9, name


@pytest.mark.parametrize("family", VIDEO)
def test_attention_is_read_of_the_layer_before_the_prune_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = AttentionRead.read

    def noted(self: AttentionRead, *args: Any) -> None:
        read.append(self.layer)
        plain(self, *args)

    monkeypatch.setattr(AttentionRead, "read", noted)
    model = model_of(family)
    videos = make_inputs(family, samples(family)[:1])
    images = make_inputs(family, [Sample([Text(3), Image(4, 4), Text(6)])])
    with compressed(model, make(family, "framefusion", keep_ratio=0.6, threshold=1.0)):
        logits_of(model, videos)
        assert read == [0]  # nothing is merged: pruned before layer 1
        logits_of(model, images)
    assert read == [0]


def test_the_report_does_not_say_that_its_layers_are_published() -> None:
    model = model_of("llava_onevision")
    inputs = make_inputs("llava_onevision", samples("llava_onevision")[:1])
    for method, says in ((FrameFusion(keep_ratio=0.6), False), (FastV(keep_ratio=0.6), True)):
        with compressed(model, method) as view:
            logits_of(model, inputs)
            notes = view.report.notes
        assert any("published layers" in note for note in notes) == says, notes


@dataclass(frozen=True, kw_only=True)
class Reader(Compressor):
    """Keeps everything, and notes what it reads."""

    name: ClassVar[str] = "reader"
    summary: ClassVar[str] = "everything"
    paper: ClassVar[str] = "control"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.QUERY_ATTENTION, Signal.DEPTH})

    seen: list[Any] = field(default_factory=list, hash=False)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        whole, queries = Budget(keep_ratio=1.0), Queries.ALL
        return (
            Placement(stage=Stage.IN_LLM, budget=whole, layer=3, queries=queries, adaptive=True),
        )

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.depth is not None
        assert tokens.depth[0] == 3
        self.seen.append(tokens.query_attention)
        index = full_index(tokens.batch, tokens.num_visual, tokens.features.device)
        return TokenPlan(keep=index)


def dense(family: str, inputs: dict[str, Any], begin: int = 0) -> Tensor:
    """`[B, H, L]`: the mean over real queries from `begin` on of layer 2's whole attention."""
    model = model_of(family, torch.float32, "eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions[2]
    real = inputs["attention_mask"][:, begin:].bool()
    rows = maps[:, :, begin:].masked_fill(~real[:, None, :, None], 0.0)
    return rows.sum(2) / real.sum(1)[:, None, None]


def assert_same(reader: Reader, report: Any, expected: Tensor) -> None:
    found = sum(len(rows) for rows in reader.seen)
    images = [(b, i) for b, s in enumerate(report.samples) for i in s.images]
    assert found == len(images)
    for b, image in images:
        own = expected[b][:, list(image.positions)]
        near = [
            row for rows in reader.seen for row in rows
            if row.shape == (own.shape[0], 1, own.shape[1])
            and torch.allclose(row[:, 0], own, rtol=0, atol=1e-6)
        ]  # fmt: skip
        assert near, image


@dataclass(frozen=True, kw_only=True)
class AsksForTheWrongMean(Reader):
    """As `Reader`, for a signal that is not read of all queries."""

    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.MEAN_ATTENTION})


@pytest.mark.refusal
def test_another_signal_of_all_queries_is_refused() -> None:
    with pytest.raises(ConfigError, match="read query_attention in place of mean_attention"):
        compress_model(model_of("llava"), AsksForTheWrongMean())


@pytest.mark.some(cases=12)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_over_all_queries_is_that_of_the_whole_map(
    family: str, padding: str, attn: str
) -> None:
    prompts = [Sample([Text(5), Image(4, 4), Text(7)]), Sample([Text(2), Image(4, 6), Text(3)])]
    inputs = make_inputs(family, prompts, padding=padding, dtype=torch.float32)
    inputs = real_positions(family, inputs)
    reader = Reader()
    model = model_of(family, torch.float32, attn)
    with compressed(model, reader) as view:
        logits_of(model, inputs)
        report = view.report
    assert_same(reader, report, dense(family, inputs))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl"])
def test_keys_of_an_earlier_turn_count_too(family: str, padding: str) -> None:
    first = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(1))
    prompts = [Sample([Text(3), Image(4, 6), Text(6)]), Sample([Text(2), Image(4, 6), Text(3)])]
    second = make_inputs(family, prompts, padding=padding, dtype=torch.float32)
    ids = torch.cat([first, second["input_ids"]], dim=1)
    mask = torch.cat([torch.ones_like(first), second["attention_mask"]], dim=1)
    model, reader = model_of(family, torch.float32), Reader()
    with compressed(model, reader) as view, torch.no_grad():
        cache = DynamicCache()
        model(input_ids=first, **{CACHE: cache})
        model(**(second | {"attention_mask": mask}), **{CACHE: cache})
        report = view.report
    whole = dense(family, second | {"input_ids": ids, "attention_mask": mask}, begin=6)
    assert_same(reader, report, whole)


@dataclass(frozen=True, kw_only=True)
class Remembers(Compressor):
    """Acts in three layers: what the first leaves of each image is noted in the third."""

    name: ClassVar[str] = "remembers"
    summary: ClassVar[str] = "everything, or one token less of each further image"
    paper: ClassVar[str] = "control"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.DEPTH})
    exact: ClassVar[bool] = False

    parts: int | None = None
    """The layer where images come to be of unequal size."""
    over: int | None = None
    """The image that is over behind the first layer."""
    seen: list[tuple[int, tuple[Memory, ...]]] = field(default_factory=list, hash=False)

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        whole = Placement(stage=Stage.IN_LLM, budget=Budget(keep_ratio=1.0), layer=1, adaptive=True)
        return tuple(replace(whole, layer=layer) for layer in (1, 2, 3))

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        assert tokens.depth is not None
        layer, memory = tokens.depth[0], ()
        index = full_index(tokens.batch, tokens.num_visual, tokens.features.device)
        fewer = tuple(row[number:] for number, row in enumerate(index))
        if layer == 1:
            memory = tuple(
                Memory(value=len(own), over=number == self.over) for number, own in enumerate(fewer)
            )
        elif layer == 3:
            self.seen.append((tokens.num_visual, tokens.memory))
        return TokenPlan(keep=fewer if layer == self.parts else index, memory=memory)


TWO_ALIKE = [Sample([Text(3), Image(4, 4), Text(6)]), Sample([Text(2), Image(4, 4), Text(7)])]


@pytest.mark.parametrize("parts", [1, 2])
def test_images_that_part_keep_what_is_remembered_of_each(parts: int) -> None:
    method, model = Remembers(parts=parts), model_of("llava")
    with compressed(model, method):
        logits_of(model, make_inputs("llava", TWO_ALIKE))
    assert len(method.seen) == 2
    for count, (memory,) in method.seen:
        assert memory.value == count


def test_an_image_is_not_over_because_another_one_is() -> None:
    method, model = Remembers(over=0), model_of("llava")
    with compressed(model, method):
        logits_of(model, make_inputs("llava", TWO_ALIKE))
    ((_, memory),) = method.seen
    assert [each.over for each in memory] == [True, False]
