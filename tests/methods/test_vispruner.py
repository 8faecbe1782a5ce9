"""VisPruner: attention and duplicate removal, by hand."""

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, only
from tests.methods.test_divprune import GOLDEN
from torch.utils._python_dispatch import TorchDispatchMode

from vispress.errors import ConfigError
from vispress.methods import VisPruner
from vispress.methods._parts.clustering.duplicate_removal import remove_duplicates
from vispress.methods._parts.geometry import segments
from vispress.methods._parts.scoring.cosines import largest_cosine, unit

ATTENTION = torch.tensor([[0.20, 0.05, 0.15, 0.02, 0.18, 0.10, 0.12, 0.18]])


def golden_tokens():
    return only(vision_features=GOLDEN[None], cls_attention=ATTENTION[:, None])


@pytest.mark.parametrize(("step", "kept"), [(1, [0, 2, 4, 6]), (8, [0, 2, 4, 5])])
def test_golden_vectors(step, kept):
    assert VisPruner(step=step).plan(golden_tokens(), 4).keep.tolist() == [kept]


def test_survivors_stand_in_descending_similarity_before_the_odd_ones():
    # even places 0, 2, 4 with cosines .8, 1, .6 to the nearest odd one; 2 is dropped
    x = torch.tensor([[[0.8, 0.6], [1, 0], [1, 0], [1, 0], [0.6, 0.8]]])
    assert remove_duplicates(torch.arange(5)[None], x, 4, 1).tolist() == [[0, 4, 1, 3]]


def test_a_count_that_crashes_the_official_code_is_met():
    # 58 of 576: the rest is odd
    (keep,) = VisPruner().plan(make_tokens(1, 576), 58).keep
    assert len(keep.unique()) == 58


def test_attention_alone_and_duplicates_alone():
    tokens = make_tokens(1, 40)
    score = tokens.cls_attention.mean(dim=1)
    top = score[0].topk(9).indices.sort().values
    assert torch.equal(VisPruner(important_ratio=1.0).plan(tokens, 9).keep[0], top)
    ranked = score.argsort(descending=True)
    alone = remove_duplicates(ranked, unit(tokens.vision_features), 9, 8).sort().values
    assert torch.equal(VisPruner(important_ratio=0.0).plan(tokens, 9).keep, alone)


def test_blocks_do_not_change_the_largest_cosine():
    x = unit(make_tokens(2, 50).features)
    ours = largest_cosine(x, x[:, :9], block=7)
    torch.testing.assert_close(ours, (x @ x[:, :9].mT).amax(dim=2))


def rounds(ranked, x, num_keep, step):
    """The rule as it reads: cosines of each round on their own, one list at a time."""
    lists = []
    for left, own in zip(ranked.tolist(), x, strict=True):
        while len(left) > num_keep > 0:
            even, odd = left[0::2], left[1::2]
            drop = min(step, len(left) - num_keep, len(even))
            nearest = (own[even] @ own[odd].mT).amax(dim=1)
            nearest = torch.where(nearest > 1 - 8 * 2**-23, 1.0, nearest).nan_to_num(nan=-2)
            if x.dtype == torch.float64:  # equal tokens have equal products
                nearest = nearest.mul(1e10).round()
            order = nearest.argsort(descending=True, stable=True).tolist()
            left = [even[i] for i in order[drop:]] + odd
        lists.append(left[:num_keep])
    return torch.tensor(lists, dtype=torch.int64).view(len(x), -1)


def ranked_tokens(batch, count, *, seed=0, dtype=torch.float32, twins=False):
    """Ranks of the tokens that are not the most important ones, and unit features of all."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, count, 40, generator=g, dtype=torch.float64)
    if twins:
        x = x[:, torch.randint(count // 3, (count,), generator=g)]
    ranked = torch.rand(batch, count, generator=g).argsort(dim=1)[:, count // 10 :]
    return ranked, unit(x.to(dtype))


WAYS = pytest.mark.parametrize(
    "way", [{}, {"ON_HOST": 1}, {"ON_HOST": 1 << 20}, {"MOST_HELD": 1}], ids=str
)
"""As it is; cosines of one list held, of all lists, and those of each round computed."""


def go(monkeypatch, way):
    for name, value in way.items():
        monkeypatch.setattr(f"vispress_kernels.distinct_select.reference.{name}", value)


@WAYS
@pytest.mark.parametrize("step", [1, 8, 1000])
@pytest.mark.parametrize("num_keep", [0, 1, 13, 62, 63])
def test_the_same_list_as_round_by_round(num_keep, step, way, monkeypatch):
    go(monkeypatch, way)
    ranked, x = ranked_tokens(3, 70)
    ours = remove_duplicates(ranked, x, num_keep, step)
    assert torch.equal(ours, rounds(ranked, x, num_keep, step))


@WAYS
def test_equal_tokens_fall_in_the_order_of_the_list(way, monkeypatch):
    go(monkeypatch, way)
    for seed in range(5):
        ranked, x = ranked_tokens(2, 90, seed=seed, twins=True)
        exact = rounds(
            ranked, ranked_tokens(2, 90, seed=seed, twins=True, dtype=torch.float64)[1], 20, 8
        )
        ours = remove_duplicates(ranked, x, 20, 8)
        alone = [remove_duplicates(r[None], o[None], 20, 8) for r, o in zip(ranked, x, strict=True)]
        for other in (exact, torch.cat(alone)):
            if "MOST_HELD" in way:  # some processors round a product by its place: twins change
                places = torch.arange(len(x))[:, None]
                assert torch.equal(x[places, ours], x[places, other])
            else:
                assert torch.equal(ours, other)


@WAYS
def test_tokens_that_are_not_numbers_are_similar_to_none(way, monkeypatch):
    go(monkeypatch, way)
    ranked, x = ranked_tokens(2, 40)
    x[0, ranked[0, 4]] = float("nan")  # at an even place
    for num_keep in (28, 10):
        assert torch.equal(
            remove_duplicates(ranked, x, num_keep, 8), rounds(ranked, x, num_keep, 8)
        )


def test_crops_of_one_size_are_worked_on_together(monkeypatch):
    tokens = make_tokens(2, crops=anyres(side=6, rows=1, cols=2))
    calls = []

    def spy(*args):
        calls.append(args[0].shape)
        return remove_duplicates(*args)

    monkeypatch.setattr("vispress.methods.vispruner.remove_duplicates", spy)
    together = VisPruner().plan(tokens, 3 * 20 + 6).keep
    assert calls == [(6, 26)]  # 2 images of 3 crops; 10 of each 36 tokens are important
    monkeypatch.setattr(segments, "_known_parts", segments._known_parts.__wrapped__)
    monkeypatch.setattr(segments, "joined", lambda parts: parts)
    assert torch.equal(VisPruner().plan(tokens, 3 * 20 + 6).keep, together)
    assert calls[1:] == [(2, 26)] * 3


def test_a_round_is_few_calls(monkeypatch):
    ranked, x = ranked_tokens(1, 600)
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with Count():
        remove_duplicates(ranked, x, 140, 8)
    assert len(calls) <= 16 * 50 + 20  # 50 rounds, views included


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"step": 0}, {"important_ratio": 1.5}, {"scores": "max"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            VisPruner(**bad)
