"""CATP: greedy coverage, both rules inside the LLM and budgets, by hand."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from tests.methods.helpers import make_tokens, only

from vispress.bench.timing.memory import peak_bytes
from vispress.context import Context
from vispress.errors import BudgetError, ConfigError
from vispress.methods import CATP
from vispress.methods.catp import cover
from vispress.types import Queries, Stage

# the shared input of the specification's golden vectors
V = torch.tensor(
    [
        [1.0, 0, 0],
        [0.9, 0.1, 0],
        [0, 1, 0],
        [0, 0.9, 0.2],
        [0, 0, 1],
        [0.6, 0.5, 0.4],
        [-0.2, 0.1, 0.9],
        [0.7, -0.1, 0.1],
    ]
)
TEXT = torch.tensor([0.0, 1, 0.2])


def objective(x, text, chosen, weight):
    """F of the paper's text, term by term."""
    similar = (torch.cosine_similarity(x[:, None], x[None], dim=-1) + 1) / 2
    fit = (torch.cosine_similarity(x, text[None], dim=-1) + 1) / 2
    return similar[:, chosen].amax(dim=1).sum() + weight * fit[chosen].sum()


def test_golden_vector_of_the_specification():
    order, gains = cover(V[None], TEXT[None], 0.7, 4)
    assert order.tolist() == [[5, 3, 6, 1]]
    expected = torch.tensor([[7.1357, 1.0756, 1.0328, 0.8239]])
    torch.testing.assert_close(gains, expected, rtol=0, atol=5e-5)


def test_gains_add_up_to_the_objective_and_meet_its_bound():
    g = torch.Generator().manual_seed(2)
    x, text = torch.randn(3, 9, 4, generator=g).double(), torch.randn(3, 4, generator=g).double()
    order, gains = cover(x, text, 0.7, 3)
    for b in range(3):
        reached = objective(x[b], text[b], order[b], 0.7)
        torch.testing.assert_close(gains[b].sum(), reached)
        best = max(objective(x[b], text[b], list(c), 0.7) for c in combinations(range(9), 3))
        assert reached >= (1 - 1 / torch.e) * best


# cosines of one image held at a time, or of none
@pytest.mark.parametrize("most", [400, 0])
def test_images_that_are_worked_on_apart_get_what_they_get_together(monkeypatch, most):
    g = torch.Generator().manual_seed(3)
    x, text = torch.randn(4, 20, 6, generator=g), torch.randn(4, 6, generator=g)
    together, gained = cover(x, text, 0.7, 9)
    monkeypatch.setattr("vispress_kernels.products.MOST_HELD", most)
    order, gains = cover(x, text, 0.7, 9)
    assert torch.equal(order, together)
    torch.testing.assert_close(gains, gained)


@pytest.mark.parametrize("num_keep", [1, 60, 150])
@pytest.mark.parametrize("weight", [0.0, 0.7, 30.0])
@pytest.mark.parametrize("most", [1 << 24, 0])
def test_bounds_of_before_choose_as_all_gains_do(monkeypatch, num_keep, weight, most):
    g = torch.Generator().manual_seed(7)
    x, text = torch.randn(1, 100, 12, generator=g), torch.randn(1, 12, generator=g)
    x = torch.cat([x, x[:, :50]], dim=1)  # with copies
    order, gains = cover(x, text, weight, num_keep)
    monkeypatch.setattr("vispress_kernels.products.MOST_HELD", most)
    monkeypatch.setattr("vispress_kernels.cover_select.reference.FEW", 0)
    monkeypatch.setattr("vispress_kernels.cover_select.reference.AT_A_TIME", 7)
    own, gained = cover(x, text, weight, num_keep)
    torch.testing.assert_close(gained, gains, rtol=1e-5, atol=1e-4)
    assert torch.equal(own[:, :100], order[:, :100])  # then nothing is gained but by rounding
    assert own[0].unique().numel() == num_keep


def test_bounds_take_memory_of_the_tokens(monkeypatch):
    g = torch.Generator().manual_seed(7)
    x, text = torch.randn(1, 2000, 4, generator=g), torch.randn(1, 4, generator=g)
    monkeypatch.setattr("vispress_kernels.products.MOST_HELD", 0)
    assert peak_bytes(x.device, lambda: cover(x, text, 0.7, 3)) < 4 * 2000 * (64 + 40)


def test_equal_tokens_tie_wherever_they_stand():
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(4)).repeat(1, 7, 1)
    order, _ = cover(x, torch.ones(1, 64), 0.0, 5)
    assert order.sort().values.tolist() == [list(range(5))]


@pytest.mark.parametrize("few", [1024, 0])
def test_a_nan_is_in_all_gains_of_its_image_and_in_no_other(monkeypatch, few):
    monkeypatch.setattr("vispress_kernels.cover_select.reference.FEW", few)
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(6))
    x[:, 2] = x[:, 0]  # equal tokens wait for the first, and count as NaN no less
    x[0, 4, 0] = float("nan")
    order, gains = cover(x, torch.ones(2, 4), 0.7, 6)
    assert order[0].tolist() == list(range(6))
    assert bool(gains[0].isnan().all())
    assert torch.equal(order[1:], cover(x[1:], torch.ones(1, 4), 0.7, 6)[0])


def test_a_token_is_taken_after_its_equal_for_what_it_fits():
    x = torch.tensor([[[1.0, 0], [0, 1], [1, 0], [0, -1]]])
    # alone: .5 + 1 + .5 + .5 of others, and the fit; then 2 gains its fit of 10 and no coverage
    order, gains = cover(x, torch.tensor([[1.0, 0]]), 10.0, 3)
    assert order.tolist() == [[0, 2, 1]]
    torch.testing.assert_close(gains, torch.tensor([[13.0, 10.0, 5.5]]))


def test_without_text_coverage_alone_decides():
    x = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(5))
    none = cover(x, torch.zeros(1, 4), 0.7, 4)[0]
    assert torch.equal(none, cover(x, torch.ones(1, 4), 0.0, 4)[0])


def demonstrations(attention, features, **means):
    zero = torch.zeros(len(features), features.shape[-1])
    context = Context(paired_text=zero, **({"query": zero, "earlier": zero} | means))
    return only(features=features, query_attention=attention, context=context)


def test_demonstrations_keep_what_gains_attention_and_is_near_the_query():
    features = torch.tensor([[[1.0, 0], [0, 1], [0, 1], [0, -1]]])
    before = torch.tensor([0.10, 0.30, 0.05, 0.10])
    now = torch.tensor([0.10, 0.10, 0.06, 0.15])  # gains 0, 0 (not -.2), .01, .05
    attention = torch.stack([before, now])[None, :, None, None]  # [B, E, H, Q, N]
    tokens = demonstrations(attention, features, query=torch.tensor([[0.0, 2.0]]))
    # cosines 0, 1, 1, -1: scores 0, .6, .61, -.55
    assert CATP().plan(tokens, 1).keep.tolist() == [[2]]
    assert CATP().plan(tokens, 2).keep.tolist() == [[1, 2]]
    assert CATP(query_weight=0.0).plan(tokens, 2).keep.tolist() == [[2, 3]]
    # no gain anywhere: the cosine alone, then the earlier token
    tokens = replace(tokens, query_attention=attention.flip(1).clamp(max=0.05))
    assert CATP().plan(tokens, 2).keep.tolist() == [[1, 2]]


def test_heads_are_averaged_before_the_difference_is_cut():
    features = torch.ones(1, 2, 2)
    before = torch.tensor([[0.5, 0.1], [0.1, 0.1]])
    now = torch.tensor([[0.1, 0.1], [0.4, 0.15]])  # token 0: -.4 and +.3, mean -.05; token 1: +.025
    attention = torch.stack([before, now])[None, :, :, None]
    assert CATP().plan(demonstrations(attention, features), 1).keep.tolist() == [[1]]


def test_the_query_image_keeps_what_is_near_the_demonstrations():
    features = torch.tensor([[[1.0, 0], [0, 1], [3, 3]]])
    tokens = demonstrations(None, features, earlier=torch.tensor([[0.1, 1.0]]))
    assert CATP().plan(tokens, 1).keep.tolist() == [[1]]
    assert CATP().plan(tokens, 2).keep.tolist() == [[1, 2]]


def test_at_entry_tokens_are_chosen_by_coverage():
    tokens = make_tokens(2, 20)
    context = replace(tokens.context, query=None, earlier=None)
    tokens = replace(tokens, query_attention=None, context=context)
    order, _ = cover(tokens.features, context.paired_text, 0.7, 8)
    assert torch.equal(CATP().plan(tokens, 8).keep, order.sort(dim=1).values)


def test_published_counts_and_layers():
    first, demos, query = CATP().placements(32)
    assert (first.stage, first.budget.resolve(576)) == (Stage.PRE_LLM, 351)
    assert (demos.layer, demos.images, demos.budget.resolve(576)) == (7, "earlier", 128)
    assert (demos.queries, demos.attention_of, demos.attention_depth) == (
        Queries.LAST,
        "previous",
        2,
    )
    assert (query.layer, query.images, query.budget.resolve(576)) == (8, "last", 128)
    assert [p.layer for p in CATP(layer=10).placements(40)] == [0, 11, 12]
    assert CATP(num_tokens=128).placements(32)[0].budget.resolve(576) == 352


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"layer": 0}, {"text_weight": -1.0}, {"query_weight": "a"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            CATP(**bad)
    with pytest.raises(BudgetError, match="ratio"):
        CATP(ratio=0.0)
    with pytest.raises(BudgetError, match=r"cannot be reached when half .* until layer 22"):
        CATP(keep_ratio=0.2, layer=20).placements(32)
    with pytest.raises(ConfigError, match=r"layer must be an integer in \[1, 30\), got 30"):
        CATP(layer=30).placements(32)
