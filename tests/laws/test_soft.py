"""Plans that are soft in training compute what the plain model does under float masks.

Logits, losses and gradients, those that flow through what tokens count among them; outside of
training the same plans drop tokens.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tests.laws.cases import FAMILIES, greedy, inputs_of, logits_of, model_of, run
from tests.laws.emulated_flash import emulating, running_flash
from tests.laws.oracle import oracle_expand, oracle_forward
from tests.laws.packing import block_diagonal, pack
from tests.laws.softly import Softly, SoftlyInSize, soft_logits
from tests.laws.test_gates import PLACES
from tests.laws.test_law10_training import (
    Gradients,
    assert_equal,
    backward,
    gradients,
    labels_of,
    loss_of,
    training,
)
from tests.laws.windows import batch, windowed
from tests.methods.helpers import make_tokens
from tests.tiny import build
from torch import Tensor
from transformers import DynamicCache

from vispress import compress_model, compressed, compression_report
from vispress.budget import Budget
from vispress.errors import CompressionStateError, ConfigError, UnsupportedModelError
from vispress.methods import DivPrune, FastV, PMoD
from vispress.methods.base import Compressor, ScorePruner
from vispress.runtime.kv_cache.hf_compat import CACHE
from vispress.runtime.tokens.masks import with_bias
from vispress.types import Placement, Queries, Signal, Stage, TokenPlan, VisualTokens

EXACT = 1e-9
METHODS = {"keys": Softly(), "features": SoftlyInSize()}


def loss_by(model: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """Transformers' loss on logits."""
    vocab = model.config.get_text_config().vocab_size
    return model.loss_function(logits=logits, labels=labels, vocab_size=vocab)  # type: ignore[no-any-return]


def trained_logits(model: Any, inputs: dict[str, Any], method: Any) -> Tensor:
    """Logits of a compressed model in training."""
    with training(model), compressed(model, method):
        return model(**inputs).logits.detach()  # type: ignore[no-any-return]


@pytest.mark.some(cases=6)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_losses_and_gradients_equal_the_formula(family: str, kind: str, padding: str) -> None:
    model, inputs, method = model_of(family), inputs_of(family, padding), METHODS[kind]
    real = inputs["attention_mask"].bool()
    with training(model):
        with compressed(model, method) as report:
            out = model(**inputs, labels=labels_of(inputs))
            assert report.mean_keep_ratio == 1
            got = gradients(model, out.loss)
        expected = soft_logits(model, inputs, method)
        plain = model(**inputs).logits
        wanted = gradients(model, loss_by(model, expected, labels_of(inputs)))
    assert out.past_key_values is None or kind == "features"
    assert (out.logits - expected)[real].abs().max() < EXACT
    assert (expected - plain)[real].abs().max() > 0.1, "nothing counts less"
    assert_equal(got, wanted)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_gradients_flow_through_what_tokens_count(family: str) -> None:
    """With what is multiplied taken off the graph they are others."""

    class Detached(Softly):
        def plan(self, tokens: Any, num_keep: int) -> TokenPlan:
            plan = super().plan(tokens, num_keep)
            assert plan.soft is not None
            return TokenPlan(keep=plan.keep, soft=plan.soft.detach())

    model, inputs, found = model_of(family), inputs_of(family), list[Gradients]()
    for method in (Softly(), Detached()):
        with training(model), compressed(model, method):
            found.append(gradients(model, loss_of(model, inputs)))
    assert any((found[0][name] - found[1][name]).abs().max() > 1e-4 for name in found[0])


@pytest.mark.some(cases=3)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_counts_whole_is_as_it_was(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    real = inputs["attention_mask"].bool()
    with training(model):
        plain = model(**inputs).logits.detach()
    got = trained_logits(model, inputs, Softly(alike=True))
    assert (got - plain)[real].abs().max() < 1e-12


def test_what_counts_next_to_nothing_is_clamped_and_has_no_gradient() -> None:
    """Where a sigmoid is 0 as a number, its log is not: gradients stay numbers."""
    model, inputs, method = model_of("llava"), inputs_of("llava"), Softly(sharpness=1e4)
    with training(model), compressed(model, method):
        got = gradients(model, loss_of(model, inputs))
    assert all(bool(gradient.isfinite().all()) for gradient in got.values())
    expected = soft_logits(model, inputs, method).detach()
    real = inputs["attention_mask"].bool()
    assert (trained_logits(model, inputs, method) - expected)[real].abs().max() < EXACT


TOLD = [
    ("sdpa", "positions"), ("sdpa", "mask"), ("sdpa", "additive"),
    ("eager", "positions"), ("eager", "additive"),
]  # fmt: skip


@pytest.mark.some(cases=4)
@pytest.mark.parametrize(("attention", "told"), TOLD)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_packed_rows_equal_the_formula(family: str, told: str, attention: str) -> None:
    model = model_of(family) if attention == "sdpa" else build(family, attn="eager")
    packed = pack(family, model)
    inputs, documents = packed.inputs, packed.documents
    if told != "positions":
        dtype = torch.bool if told == "mask" else torch.float64
        inputs = inputs | {"attention_mask": block_diagonal(packed, dtype, own=False)}
    got = trained_logits(model, inputs, Softly())
    plain = {n: v for n, v in inputs.items() if n != "attention_mask"}
    expected = soft_logits(model, plain, Softly(), documents).detach()
    assert (got - expected)[documents >= 0].abs().max() < EXACT


@pytest.mark.parametrize("window", [8, 20])
def test_windows_stay(window: int) -> None:
    model, inputs = windowed("mistral", window), batch("mistral")
    expected = soft_logits(model, inputs, Softly(), window=window).detach()
    real = inputs["attention_mask"].bool()
    got = trained_logits(model, inputs, Softly())
    assert (got - expected)[real].abs().max() < EXACT
    wide = soft_logits(model, inputs, Softly()).detach()
    assert (got - wide)[real].abs().max() > 1e-3


@pytest.mark.some(cases=2)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_checkpoints_change_no_gradient(family: str, place: str) -> None:
    model, inputs = build(family), inputs_of(family)
    with training(model), compressed(model, Softly()):
        plain = loss_of(model, inputs)
        expected = backward(model, plain)
        with PLACES[place](model, reentrant=False):
            loss = loss_of(model, inputs)
            got = backward(model, loss)
    assert torch.equal(loss, plain)
    assert_equal(got, expected)


@pytest.mark.parametrize("place", PLACES)
def test_a_reentrant_checkpoint_is_refused_by_name(place: str) -> None:
    model, inputs = build("llava"), inputs_of("llava")
    says = r"reentrant.*softened.*'use_reentrant': False"
    with training(model), compressed(model, Softly()), PLACES[place](model, reentrant=True):
        with pytest.raises(CompressionStateError, match=says):
            loss_of(model, inputs)
        with torch.no_grad():
            loss_of(model, inputs)  # tokens are dropped, and there is no backward


@pytest.mark.parametrize("kind", METHODS)
def test_outside_of_training_tokens_are_dropped(kind: str) -> None:
    """In eval mode, and in train mode without gradients, as reinforcement learning generates."""
    model, inputs, method = model_of("llava"), inputs_of("llava"), METHODS[kind]
    result = run(model, inputs, method)
    assert result.report.mean_keep_ratio < 0.5
    with torch.no_grad():
        expected = oracle_expand(
            oracle_forward(model, inputs, result.alive), result.report.alive(5)
        )
    real = inputs["attention_mask"].bool()
    with compressed(model, method):
        got = logits_of(model, inputs)
        sequences, _ = greedy(model, inputs, 3)
        with training(model), torch.no_grad():
            again = model(**inputs).logits
            assert torch.equal(greedy(model, inputs, 3)[0], sequences)
    assert (got - expected)[real].abs().max() < 1e-5
    assert torch.equal(again, got)


@dataclass(frozen=True, kw_only=True)
class ByColumn(ScorePruner):
    """Keeps what all rows attend to most, before layer 3."""

    name: ClassVar[str] = "by_column"
    summary: ClassVar[str] = "the most attended"
    paper: ClassVar[str] = "control"
    reads: ClassVar[frozenset[Signal]] = frozenset({Signal.QUERY_ATTENTION})

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        budget = Budget(num_tokens=4)
        return (Placement(stage=Stage.IN_LLM, budget=budget, layer=3, queries=Queries.ALL),)

    def score(self, tokens: VisualTokens) -> Tensor:
        assert tokens.query_attention is not None
        return tokens.query_attention.mean(dim=(1, 2))


@pytest.mark.parametrize("last", [FastV(num_tokens=4, layer=3), ByColumn()], ids=lambda m: m.name)
def test_chains_drop_ahead_of_what_is_soft_and_read_behind_it(last: Compressor) -> None:
    """DivPrune's rows are gone in training, too; attention is read as the model computes it."""
    model, inputs = model_of("llava"), inputs_of("llava")
    chain = [DivPrune(keep_ratio=0.5), Softly(layers=(1,), sharpness=5.0), last]
    eager = build("llava", attn="eager")
    with training(eager), compressed(eager, chain[:2], positions="original"):
        maps = eager(**inputs, output_attentions=True, use_cache=False).attentions[2]
    with training(model), compressed(model, chain, positions="original") as report:
        model(**inputs)
        image = report.samples[0].images[0]
        alive = report.alive(1)[0]
    assert [len(placement.kept) for placement in image.placements] == [18, 18, 4]
    rows = alive.nonzero()[:, 0] if isinstance(last, ByColumn) else torch.tensor([-1])
    places = torch.tensor(image.positions)[list(image.placements[1].kept)]
    best = maps[0][:, rows][..., places].mean(dim=(0, 1)).topk(4).indices.sort().values
    assert places[best].tolist() == [image.positions[k] for k in image.placements[2].kept]


def test_rows_that_bypass_layers_are_no_keys_there() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    chain = [Softly(layers=(0,)), PMoD(beta=0.1, high=0.7, low=0.2)]
    with training(model), compressed(model, chain) as report:
        loss = loss_of(model, inputs)
        assert bool(loss.isfinite())
        counts = [kept[0] for kept in report.visual_per_layer]
    assert max(counts) < 36


def test_what_cannot_be_soft_is_refused_by_name() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    with training(model), compressed(model, Softly()):
        with (
            emulating(),
            running_flash(model),
            pytest.raises(UnsupportedModelError, match=r"softly adds to attention logits.*'sdpa'"),
        ):
            model(**inputs)
        with pytest.raises(ConfigError, match=rf"softly drops nothing.*{CACHE}"):
            model(**inputs, **{CACHE: DynamicCache(config=model.config.text_config)})

    class Bypassing(Softly):
        def placements(self, num_layers: int) -> tuple[Placement, ...]:
            (one,) = Softly(layers=(2,)).placements(num_layers)
            return (Placement(stage=Stage.SKIP, budget=one.budget, layer=2, until=3),)

    with pytest.raises(ConfigError, match=r"pre_llm and in_llm alone.*'skip'"):
        compress_model(model, Bypassing())

    class Silent(Softly):
        softens = None

    with compressed(model, Silent()), pytest.raises(ValueError, match="softens = None"):
        model(**inputs)


def test_a_report_says_that_nothing_is_dropped_in_training() -> None:
    model, inputs = build("llava"), inputs_of("llava")
    compress_model(model, Softly())
    with training(model):
        model(**inputs)
        notes = compression_report(model).notes
    assert any("in training what it would drop counts less" in note for note in notes)
    model(**inputs)
    with torch.no_grad():
        model(**inputs)
    assert not any("in training" in note for note in compression_report(model).notes)


def test_hidden_keys_stay_hidden_in_half_precision() -> None:
    """The least number and a bias add up to minus infinity there, and padding to no number."""
    least = torch.finfo(torch.float16).min
    mask = torch.tensor([[[[least, least], [0.0, -3.0]]]], dtype=torch.float16)
    found = with_bias(mask, torch.tensor([[-30.0, -1.0]]), 2, torch.float16)
    assert found.tolist() == [[[[least, least], [-30.0, -4.0]]]]
    assert with_bias(mask == 0, torch.tensor([[-30.0, -1.0]]), 2, torch.float16).tolist() == [
        [[[least, least], [-30.0, least]]]
    ]


def test_a_plan_is_soft_or_changes_values() -> None:
    bucket, keep = make_tokens(1, 3, dim=4), torch.tensor([[0]])
    soft = torch.full((1, 3), 0.5)
    with pytest.raises(ValueError, match="one of features"):
        TokenPlan(keep=keep, soft=soft, features=torch.zeros(1, 1, 4)).check(bucket, 1, exact=True)
    with pytest.raises(ValueError, match="soft has shape"):
        TokenPlan(keep=keep, soft=soft[:, :2]).check(bucket, 1, exact=True)
    with pytest.raises(ValueError, match=r"soft must be in \(0, 1\]"):
        TokenPlan(keep=keep, soft=soft * 3).check_values(bucket)


@pytest.mark.refusal
@pytest.mark.parametrize("method", ["covipal", "vision_selector"])
def test_parameters_in_train_mode_and_an_llm_in_eval_mode_are_refused(method: str) -> None:
    """The habit with a frozen LLM: gradients would be zeros, and training go on in silence."""
    model, inputs = model_of("llava"), inputs_of("llava")
    with compressed(model, method, keep_ratio=0.5):
        model.model.vispress_modules.train()
        with pytest.raises(CompressionStateError, match="in eval mode, in which tokens are drop"):
            model(**inputs, labels=labels_of(inputs))
        with torch.no_grad():
            model(**inputs)
        model.model.vispress_modules.eval()
        model(**inputs, labels=labels_of(inputs))
