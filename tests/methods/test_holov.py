"""HoloV: runs, quotas and what is kept of each, by hand."""

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, only

from vispress.bench.timing.memory import peak_bytes
from vispress.errors import ConfigError
from vispress.methods import HoloV
from vispress.methods._parts.scoring import cosines
from vispress.methods._parts.scoring.cosines import equal_runs, side_by_side
from vispress.methods.holov import cosine_variance, holistic_score, quotas

X = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]])
A = torch.tensor([[0.01, 0.02, 0.03]])


def test_golden_vector():
    variance = torch.tensor([[0.1875, 0.1875, 0.25]])
    torch.testing.assert_close(cosine_variance(X), variance, rtol=0, atol=1e-5)
    code = holistic_score(A, X, "code", 0.09)
    torch.testing.assert_close(code, torch.tensor([[11.62, 21.62, 32.16]]), rtol=0, atol=5e-3)
    # paper: gamma = mean a / mean variance = .02 / .20833
    paper = holistic_score(A, X, "paper", 0.09)
    torch.testing.assert_close(paper, A + 0.096 * variance, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_long_run_is_compared_in_blocks(monkeypatch):
    x = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0))
    whole = cosine_variance(x)
    monkeypatch.setattr("vispress.methods.holov.MOST_PAIRS", 7 * 50)
    torch.testing.assert_close(cosine_variance(x), whole)
    x = torch.randn(1, 3000, 4, generator=torch.Generator().manual_seed(0))
    assert peak_bytes(x.device, lambda: cosine_variance(x)) < 4 * 3000 * 100


def test_worked_example_of_quotas():
    weight = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    assert quotas(weight, 10).tolist() == [[6, 3, 1, 0]]
    assert quotas(weight, 1).tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize(("n", "runs"), [(11, 4), (12, 4), (5, 5), (7, 5), (7, 1)])
@pytest.mark.parametrize("most", [1, 20, 1 << 22])
def test_runs_are_those_of_tensor_split(n, runs, most, monkeypatch):
    monkeypatch.setattr(cosines, "MOST_PAIRS", most)
    x = torch.arange(2.0 * n * 3).view(2, n, 3)
    parts = equal_runs(x, runs)
    found = [run for part in parts for run in part.view(2, -1, *part.shape[1:]).unbind(1)]
    expected = x.tensor_split(runs, dim=1)
    assert len(found) == runs
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(side_by_side(parts, 2), x.flatten(1))
    pairs = [(len(part) // 2, len(part) // 2 * part.shape[1] ** 2) for part in parts]
    assert all(together == 1 or total <= most for together, total in pairs)


def test_a_run_of_one_token_weighs_its_bare_attention():
    assert holistic_score(A[:, :1], X[:, :1], "code", 0.09).tolist() == A[:, :1].tolist()


def test_the_most_attended_of_each_run_are_kept():
    # two runs of three; .625 and .375 of 3, truncated, and one more to the first
    a = torch.tensor([[0.3, 0.0, 0.2, 0.2, 0.1, 0.0]])
    tokens = only(cls_attention=a[:, None], features=X.repeat(1, 2, 1))
    assert HoloV(num_crops=2).plan(tokens, 3).keep.tolist() == [[0, 2, 3]]


def test_what_a_run_cannot_hold_goes_to_the_most_attended_elsewhere():
    # the first run of two would get three
    a = torch.tensor([[0.9, 0.8, 0.0, 0.02, 0.01, 0.03]])
    tokens = only(cls_attention=a[:, None], features=torch.ones(1, 6, 2))
    assert HoloV(num_crops=3).plan(tokens, 3).keep.tolist() == [[0, 1, 5]]


def test_crops_are_one_sequence_and_newlines_stay():
    crops = anyres(side=3, rows=2, cols=1)
    tokens = make_tokens(1, crops=crops)
    (keep,) = HoloV(num_crops=4).plan(tokens, 16).keep
    visual = torch.where(crops.segment >= 0)[0]
    newline = torch.where(crops.segment < 0)[0]
    flat = only(
        cls_attention=tokens.cls_attention[..., visual], features=tokens.features[:, visual]
    )
    chosen = HoloV(num_crops=4).plan(flat, 16 - len(newline)).keep[0]
    assert keep.tolist() == sorted(visual[chosen].tolist() + newline.tolist())


@pytest.mark.parametrize(("num_keep", "runs"), [(64, 16), (128, 8), (192, 5)])
def test_published_number_of_runs(num_keep, runs):
    tokens = make_tokens(1, 576)
    keep = HoloV().plan(tokens, num_keep).keep
    assert torch.equal(keep, HoloV(num_crops=runs).plan(tokens, num_keep).keep)
    assert not torch.equal(keep, HoloV(num_crops=runs + 1).plan(tokens, num_keep).keep)


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"num_crops": 0}, {"alpha": -1.0}, {"variant": "best"}, {"scores": "max"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            HoloV(**bad)
