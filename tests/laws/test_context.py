"""What the runtime hands to methods for prompts of several images, and to chains at one layer."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tests.laws.cases import Spy, model_of, real_positions
from tests.tiny import Image, Sample, Text, make_inputs, visual_positions
from torch import Tensor

from vispress import compress_model, compressed, compression_report, remove_compression
from vispress.methods import CATP, FastV, PyramidDrop
from vispress.methods.base import Compressor, top_indices
from vispress.types import Placement, Queries, Signal, Stage, TokenPlan, VisualTokens

# two demonstrations (the first has two pictures) and a query; one picture; text in front
PROMPTS = [
    Sample([Text(2), Image(), Image(), Text(3), Image(), Text(5), Image(), Text(4)]),
    Sample([Text(3), Image(), Text(6)]),
    Sample([Text(2), Image(), Text(4), Image()]),
]
PAIRED = {"llava": ((1, 1, 2, 3), (1,), (1, 1)), "qwen2_5_vl": ((1, 2, 3, 4), (1,), (1, 2))}
"""Which run of text belongs to each image; Qwen's marks stand between all pictures, and behind."""


def spied(model: Any, inputs: dict[str, Any], *chain: Compressor) -> tuple[list[Spy], Any, Any]:
    """Spies of a chain, the report and the hidden states of a compressed forward."""
    spies = [Spy() for _ in chain]
    compress_model(model, [spy.watch(one) for spy, one in zip(spies, chain, strict=True)])
    try:
        with torch.no_grad():
            out = model(**inputs, output_hidden_states=True)
        return spies, compression_report(model), out.hidden_states
    finally:
        remove_compression(model)


def runs_of_text(inputs: dict[str, Any], sample: int, visual: list[Tensor]) -> list[Tensor]:
    """Positions of the runs of valid tokens that are no placeholders."""
    text = inputs["attention_mask"][sample].bool().clone()
    text[torch.cat(visual)] = False
    places = text.nonzero().flatten()
    breaks = ((places[1:] - places[:-1]) > 1).nonzero().flatten() + 1
    return list(torch.tensor_split(places, breaks.tolist()))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_context_is_the_means_of_what_it_says(family: str, padding: str) -> None:
    model = model_of(family)
    inputs = make_inputs(family, PROMPTS, padding=padding)
    (spy,), report, hidden = spied(model, real_positions(family, inputs), CATP(keep_ratio=0.4))
    visual = visual_positions(family, model, inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    texts = [runs_of_text(inputs, b, own) for b, own in enumerate(visual)]
    kept = [[[p.kept for p in i.placements] for i in s.images] for s in report.samples]

    def mean(b: int, layer: int, places: list[Tensor]) -> Tensor:
        return hidden[layer][b, torch.cat(places)].mean(0)

    def left(b: int, image: int, placement: int) -> Tensor:
        return visual[b][image][list(kept[b][image][placement])]

    seen = dict.fromkeys([(False, False), (False, True), (True, False), (True, True)], 0)
    for tokens, _ in spy.seen:
        context, last = tokens.context, len(tokens.features) == len(PROMPTS)
        assert context is not None
        inside = tokens.num_visual < tokens.num_original
        stage = last + 1 if inside else 0
        alike = [
            (b, i) for b, own in enumerate(visual) for i in range(len(own))
            if (i == len(own) - 1) == last
        ]  # fmt: skip
        for row, (b, i) in enumerate(alike):
            own = embeds[b, texts[b][PAIRED[family][b][i]]].mean(0)
            torch.testing.assert_close(context.paired_text[row], own)
            seen[inside, last] += 1
            if not inside:
                assert context.query is context.earlier is None
                continue
            assert context.query is not None
            assert context.earlier is not None
            behind = [t for t in texts[b] if t[0] > visual[b][-1][-1]]
            query = mean(b, stage + 1, [left(b, len(visual[b]) - 1, stage - 1), *behind])
            torch.testing.assert_close(context.query[row], query)
            earlier = [left(b, n, stage - 1) for n in range(len(visual[b]) - 1)]
            torch.testing.assert_close(context.earlier[row], mean(b, stage + 1, earlier or behind))
    assert list(seen.values()) == [4, 3, 4, 3]


@dataclass(frozen=True, kw_only=True)
class Reader(Compressor):
    """Reads the attention of one layer or more, and drops the last token of each image."""

    name: ClassVar[str] = "reader"
    summary: ClassVar[str] = "all but one"
    paper: ClassVar[str] = "control"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.QUERY_ATTENTION})

    layer: int = 3
    depth: int = 1
    ahead: bool = False

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return (
            Placement(
                stage=Stage.IN_LLM,
                budget=self.budget(num_layers),
                layer=self.layer,
                queries=Queries.LAST,
                attention_of="next" if self.ahead else "previous",
                attention_depth=self.depth,
            ),
        )

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        return TokenPlan(keep=torch.arange(num_keep).expand(tokens.batch, -1))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_several_layers_are_read_as_each_would_be(family: str) -> None:
    model = model_of(family)
    inputs = make_inputs(family, PROMPTS[:2], padding="left")

    def read(layer: int, depth: int) -> list[Tensor]:
        reader = Reader(layer=layer, depth=depth, num_tokens=15)
        (spy,), _, _ = spied(model, inputs, reader)
        return [tokens.query_attention for tokens, _ in spy.seen]  # type: ignore[misc]

    for deep, *single in zip(read(4, 3), read(2, 1), read(3, 1), read(4, 1), strict=True):
        assert torch.equal(deep, torch.stack(single, dim=1))


def test_a_chain_at_one_layer_reads_the_columns_of_what_is_left() -> None:
    """The first member drops rows that were there when the layer before ran."""
    model = model_of("llava")
    inputs = make_inputs("llava", PROMPTS, padding="left")
    drop, fastv = PyramidDrop(layers=(2,), ratios=(0.5,)), FastV(keep_ratio=0.5, layer=2)
    (_, chained), _, _ = spied(model, inputs, drop, fastv)
    (alone,), _, _ = spied(model, inputs, fastv)
    for (tokens, plan), (whole, _) in zip(chained.seen, alone.seen, strict=True):
        expected = whole.query_attention.gather(  # type: ignore[union-attr]
            3, tokens.index[:, None, None].expand(-1, tokens.query_attention.shape[1], -1, -1)
        )
        assert torch.equal(tokens.query_attention, expected)
        assert torch.equal(plan.keep, top_indices(expected.mean(dim=(1, 2)), plan.counts[0]))


def test_a_chain_that_looks_ahead_twice_looks_at_what_is_left() -> None:
    """Whether the first member looked ahead itself makes no difference to the second."""
    model = model_of("llava")
    inputs = make_inputs("llava", PROMPTS, padding="left")
    seen = []
    for ahead in (False, True):
        chain = Reader(layer=2, num_tokens=18, ahead=ahead), PyramidDrop(layers=(2,))
        (_, second), _, _ = spied(model, inputs, *chain)
        seen.append([tokens.query_attention for tokens, _ in second.seen])
    assert all(torch.equal(one, two) for one, two in zip(*seen, strict=True))


def test_images_that_a_placement_leaves_pass_whole() -> None:
    model = model_of("llava")
    inputs = make_inputs("llava", PROMPTS, padding="left")
    with compressed(model, CATP(ratio=0.25)) as report, torch.no_grad():
        model(**inputs)
        counts = [[[p.num_kept for p in i.placements] for i in s.images] for s in report.samples]
    entered, left = counts[0][0][0], counts[0][0][-1]
    assert entered > left
    for sample in counts:
        assert sample[:-1] == [[entered, left, left]] * (len(sample) - 1)
        assert sample[-1] == [entered, entered, left]
