"""Lessons on the model's own answers: which prompts stay, relevance by gradients, regions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.helpers import make_tokens

from vispress import remove_compression
from vispress.adapters.base import find_adapter
from vispress.bench.model.loaded_model import LoadedModel, load_named_model
from vispress.bench.tasks.task import Prompt
from vispress.distillation.answer_regions import (
    Region,
    find_regions,
    marks,
    region_loss,
    sharpest_heads,
)
from vispress.distillation.answer_relevance import explain, label, relevance
from vispress.distillation.lessons import Pupil, find_lesson
from vispress.distillation.own_answers import answered
from vispress.distillation.scenes import training_prompts
from vispress.methods import SDRPN, XAICompress


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_named_model("reference", "cpu", "fp32")


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return list(training_prompts(6, 3))


class Parrot:
    """Answers every prompt alike."""

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        return ["yes"] * len(prompts)


def test_own_answers_of_one_picture_stay_and_right_ones_if_asked(prompts: list[Prompt]) -> None:
    one = prompts[0]
    asked = [
        replace(one, answer="yes"),
        replace(one, answer="no"),
        replace(one, answer=""),
        replace(one, images=one.images * 2),
        replace(one, images=()),
    ]
    told: list[int] = []
    parrot: Any = Parrot()
    own = answered(parrot, asked, right=False, batch_size=2, advance=told.append)
    assert [prompt.answer for prompt in own] == ["yes"] * 3
    assert told == [2, 2, 1]
    assert len(list(answered(parrot, asked, right=True))) == 2


def test_relevance_is_a_row_of_the_product_over_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(2, 3, 5, 5, generator=generator).tril() for _ in range(3)]
    gradients = [torch.randn(2, 3, 5, 5, generator=generator) for _ in range(3)]
    rolled = torch.eye(5).expand(2, 5, 5)
    for a, g in zip(maps, gradients, strict=True):
        rolled = rolled + (a * g).clamp(min=0).mean(dim=1) @ rolled
    found = relevance(maps, gradients, torch.tensor([4, 2]))
    torch.testing.assert_close(found, torch.stack([rolled[0, 4], rolled[1, 2]]))


def test_the_lower_half_counts_for_nothing() -> None:
    found = label(torch.tensor([3.0, 0.5, 1.0, 0.1]))
    torch.testing.assert_close(found, torch.tensor([0.75, 0.0, 0.25, 0.0]))
    assert label(torch.zeros(4)).tolist() == [0.0] * 4


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize("trains", [True, False], ids=["", "frozen"])
def test_images_are_explained_and_the_model_is_left_as_it_was(
    loaded: LoadedModel, prompts: list[Prompt], trains: bool
) -> None:
    model, adapter = loaded.model, find_adapter(loaded.model)
    model.requires_grad_(trains)
    before = adapter.language_model.config._attn_implementation
    found = list(explain(loaded, prompts, batch_size=4))
    assert adapter.language_model.config._attn_implementation == before
    assert {p.requires_grad for p in model.parameters()} == {trains}
    assert all(p.grad is None for p in model.parameters())
    model.requires_grad_(True)
    assert len(found) == len(prompts)
    for one in found:
        assert one.target.sum() == pytest.approx(1.0)
        assert (one.target == 0).sum() >= 72
        assert one.attention.shape == one.target.shape == (144,)
    alone = next(iter(explain(loaded, prompts[5:], batch_size=1)))  # padding says nothing
    torch.testing.assert_close(alone.target, found[5].target, rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(alone.attention, found[5].attention, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_relevance_lies_where_the_evidence_is(loaded: LoadedModel) -> None:
    asked = [one for one in training_prompts(16, 3) if one.evidence and one.evidence[0]]
    shares = [
        float(one.target[list(prompt.evidence[0])].sum()) / (len(prompt.evidence[0]) / 144)
        for prompt, one in zip(asked, explain(loaded, asked), strict=True)
    ]
    assert sum(shares) / len(shares) > 3, "times what evenly spread relevance would have there"


def test_the_attention_is_what_the_method_reads(loaded: LoadedModel, prompts: list[Prompt]) -> None:
    from tests.laws.running import Spy

    from vispress import compressed

    spy, found = Spy(), next(iter(explain(loaded, prompts[:1])))
    with compressed(loaded.model, spy.watch(XAICompress(keep_ratio=0.5))), torch.no_grad():
        loaded.model(**loaded.encode(prompts[:1]))
    ((tokens, _),) = spy.seen
    torch.testing.assert_close(tokens.mean_attention[0], found.attention, rtol=1e-3, atol=1e-6)


# --- regions


def test_cells_are_marked_by_the_highest_attention_and_its_box() -> None:
    tokens = replace(make_tokens(batch=3, grid=(1, 4, 5)), features=torch.ones(3, 20, 8))
    attention = torch.full((3, 20), 0.05)
    attention[0, [6, 12]] = torch.tensor([1.0, 0.3])  # (1, 1) and (2, 2)
    attention[0, [7, 19]] = 0.15  # inside of the box, and outside
    attention[1, [0, 19]] = 1.0  # the box is the image
    attention[2] = 0.0
    first, second, third = marks(tokens, attention)
    assert second is None
    assert third is None
    assert first is not None
    assert first.nonzero()[:, 0].tolist() == [6, 7, 11, 12, 19]
    assert first[[6, 12]].tolist() == [1, 1]
    assert first[[7, 11, 19]].tolist() == [-100] * 3
    features = tokens.features.clone()
    features[0, 6] *= 4  # a sink
    (first, *_) = marks(replace(tokens, features=features), attention)
    assert first is not None
    assert first[12] == 1
    assert first[6] == 0


@pytest.mark.slow
def test_states_are_those_of_the_image_and_the_last_prompt_token(
    loaded: LoadedModel, prompts: list[Prompt]
) -> None:
    own = list(answered(loaded, prompts, right=True))
    heads = sharpest_heads(loaded, own)
    assert len(set(heads)) == 3
    assert {number for number, _ in heads} <= set(range(5))
    regions = list(find_regions(loaded, own, 2, heads))
    assert len(regions) >= 4
    layer, matched = find_adapter(loaded.model).decoder_layers[2], 0
    for prompt in own:
        inputs = dict(loaded.encode([prompt]))
        seen: list[torch.Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            loaded.model(**inputs, use_cache=False)
            normed = layer.input_layernorm(seen[0][0])
        hook.remove()
        visual = inputs["input_ids"][0] == loaded.model.config.image_token_id
        matched += sum(
            torch.allclose(one.features, normed[visual], atol=1e-3)
            and torch.allclose(one.asking, normed[-1], atol=1e-3)
            for one in regions
        )
    assert matched == len(regions)


@pytest.mark.slow
def test_regions_lie_where_the_evidence_is(loaded: LoadedModel) -> None:
    asked = [one for one in training_prompts(30, 3) if one.evidence and one.evidence[0]]
    heads = sharpest_heads(loaded, asked[:8])
    inside = []
    for one in asked:
        for region in find_regions(loaded, [one], 2, heads):
            front = set((region.target == 1).nonzero()[:, 0].tolist())
            inside.append(bool(front & set(one.evidence[0])))
    assert len(inside) > 10
    assert sum(inside) / len(inside) > 0.7


def test_cells_that_are_neither_count_for_nothing() -> None:
    target = torch.tensor([1.0, 0.0, -100.0])
    region = Region(torch.zeros(3, 4), torch.zeros(4), target)

    class Known(torch.nn.Linear):
        def forward(self, x: torch.Tensor, asking: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return torch.tensor([[2.0, -1.0, 50.0]])

    module = Known(1, 1)
    wanted = (torch.tensor(-2.0).exp().log1p() + torch.tensor(-1.0).exp().log1p()) / 2
    torch.testing.assert_close(region_loss(module, [region]), wanted)


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("method", [XAICompress(keep_ratio=0.1), SDRPN(num_tokens=24)])
def test_lessons_lower_what_they_measure(loaded: LoadedModel, method: Any) -> None:
    lesson = find_lesson(method.name)
    pupil = Pupil(loaded, method, training_prompts(40), steps=8, lr=lesson.lr)
    try:
        curve = lesson.teach(pupil)
    finally:
        remove_compression(loaded.model)
    before, after = curve.held_out
    assert after < before
    assert len(curve.loss) == 8
