"""`vispress search`: what is found, what it costs, and that a stopped search goes on."""

import sys
from dataclasses import replace

import pytest
import torch

from vispress import compress_model, compression_report, remove_compression
from vispress.bench.results.files import ResultsError
from vispress.bench.search.greedy import (
    GRID,
    SearchRequest,
    greedy_steps,
    grid_for,
    scheduled,
    search_greedy,
)
from vispress.bench.search.notes import add_note, read_notes
from vispress.bench.search.objective import Calibration, ScheduleObjective, divergence
from vispress.bench.search.sigmoid import search_sigmoid
from vispress.bench.search.withdrawal import search_withdrawal
from vispress.config import load_config
from vispress.errors import BudgetError, ConfigError
from vispress.methods import VTW, Layerwise, NoImage

SMALL = Calibration(tasks=("count", "attribute"), questions=3, batch_size=2, max_new_tokens=2)


class Told:
    """An objective that knows the rate every layer needs; good is all of them or more."""

    num_layers, uncompressed = 7, 1.0

    def __init__(self, *need):
        self.need, self.asked = need, []

    def rates(self, method):
        rates = [1.0] * self.num_layers
        for placement in method.placements(self.num_layers):
            ratio = placement.budget.keep_ratio or 0.0
            rates[placement.layer :] = [ratio] * (self.num_layers - placement.layer)
        return rates

    def least(self, tolerance):
        return 1.0 - tolerance

    def value(self, method, what=""):
        self.asked.append(what)
        return float(all(a >= b for a, b in zip(self.rates(method), self.need, strict=True)))

    def share_of_tokens(self, method):
        return sum(self.rates(method)) / self.num_layers

    share_of_flops = share_of_tokens


@pytest.fixture
def objective(subject):
    return ScheduleObjective(subject, SMALL)


# --- greedy


@pytest.mark.parametrize(
    "need",
    [
        (1.0, 0.85, 0.85, 0.4, 0.06, 0.0, 0.0),
        (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
        (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (1.0, 1.0, 0.3, 0.3, 0.3, 0.3, 0.2),
    ],
)
def test_greedy_finds_the_least_rate_of_every_layer(need):
    told = Told(*need)
    found = search_greedy(told, scheduled("layerwise"), tolerance=0.0)
    expected = [1.0] + [min(rate for rate in GRID if rate >= n) for n in need[1:]]
    assert told.rates(found.method) == expected
    assert found.value == 1.0
    assert len(told.asked) <= greedy_steps(7) + 1
    assert len(set(told.asked)) == len(told.asked)


def test_other_rankings_follow_the_same_schedule():
    told = Told(1.0, 0.9, 0.3, 0.3, 0.0, 0.0, 0.0)
    request = SearchRequest.of("pyramiddrop", {}, None, 1.0)
    found = request.search(told)
    assert found.method.name == "pyramiddrop"
    assert (found.method.layers, found.method.ratios) == ((1, 2, 4), (0.9, 0.3, 0.05))
    assert 0.0 not in grid_for("pyramiddrop")
    assert scheduled("layerwise", queries="text")([1.0, 1.0, 0.5]).queries == "text"
    assert request.most(7) == 6 * 4


# --- withdrawal


class Withdrawn(Told):
    """An objective that knows what every layer of withdrawal is worth."""

    uncompressed = 0.0

    def __init__(self, *worth):
        super().__init__()
        self.worth, self.num_layers = worth, len(worth)

    def least(self, tolerance):
        return -tolerance

    def value(self, method, what=""):
        self.asked.append(method.layer)
        return self.worth[method.layer]


def test_withdrawal_finds_the_first_layer_that_is_good_enough():
    told = Withdrawn(-9, -5, -0.5, -0.002, -0.4, 0)  # a later layer may be worse again
    request = SearchRequest(withdraws=True, tolerance=0.003)
    assert request.search(told).method.layer == 3
    assert told.asked == [1, 2, 3, 3]
    assert (request.most(6), request.most(32), request.words) == (
        5,
        27,
        "withdrawal, tolerance 0.003",
    )
    # deep models are searched from layer 5 on, as in the code
    assert search_withdrawal(Withdrawn(*[0.0] * 11)).method.layer == 5


def test_divergence_the_other_way_is_withdrawals(subject):
    reverse = ScheduleObjective(subject, replace(SMALL, metric="reverse_kl"))
    assert reverse.uncompressed == 0.0
    found = [reverse.value(VTW(layer=layer)) for layer in (1, 3)]
    plain = ScheduleObjective(subject, SMALL).value(VTW(layer=1))
    assert found[0] < found[1] <= 0
    assert found[0] != plain
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    assert float(divergence(p, q)) == pytest.approx(0.510826, abs=1e-6)
    assert float(divergence(q, p)) == pytest.approx(0.368064, abs=1e-6)


@pytest.mark.refusal
def test_withdrawal_that_never_is_good_enough_is_refused():
    with pytest.raises(ConfigError, match="needed in every layer: the best withdrawal is worth -1"):
        search_withdrawal(Withdrawn(*range(-11, 0)))


@pytest.mark.refusal
def test_what_a_search_cannot_use_is_refused():
    for name, options, unit, words in (
        ("fastv", {}, None, "fastv has no layers and ratios to search; have: covipal, layerwise"),
        ("layerwise", {"keep_ratio": 0.5}, None, "keep_ratio is what the search finds"),
        ("layerwise", {"floor": 0.5}, None, "floor is of a sigmoid"),
        ("layerwise", {"querys": "text"}, None, "did you mean 'queries'"),
        ("pyramiddrop", {}, "tokens", "a schedule of layerwise, not of pyramiddrop"),
        ("layerwise", {"midpoint": 0.5}, "flops", "midpoint is what the search finds"),
    ):
        with pytest.raises(ConfigError, match=words):
            SearchRequest.of(name, options, unit, 0.5)
    with pytest.raises(ConfigError, match="grid must hold"):
        search_greedy(Told(*[1.0] * 7), scheduled("layerwise"), grid=(0.5, 0.1))
    for bad in ({"metric": "speed"}, {"questions": 0}, {"tasks": ("cuont",)}, {"tasks": ()}):
        with pytest.raises(ConfigError, match=next(iter(bad)) if "tasks" not in bad else "task"):
            Calibration(**{"tasks": ("count",), **bad})


# --- values


@pytest.mark.slow
def test_divergence_is_that_of_the_first_answer_token(objective):
    assert objective.uncompressed == 0.0
    assert objective.value(Layerwise(keep_ratio=1.0)) == 0.0
    subject, method = objective.loaded, Layerwise(midpoint=0.2)
    means = {}
    for batch in objective.batches:
        inputs = subject.encode(batch.prompts)
        with torch.no_grad():
            p = subject.model(**inputs).logits[:, -1].log_softmax(-1)
            compress_model(subject.model, method)
            q = subject.model(**inputs).logits[:, -1].log_softmax(-1)
            remove_compression(subject.model)
        means.setdefault(batch.task, []).extend((p.exp() * (p - q)).sum(-1).tolist())
    expected = -sum(sum(own) / len(own) for own in means.values()) / len(means)
    assert objective.value(method) == pytest.approx(expected, abs=1e-6)
    assert expected < 0
    assert objective.least(0.25) == -0.25


@pytest.mark.slow
def test_loyalty_and_accuracy_are_of_whole_answers(subject):
    loyal = ScheduleObjective(subject, replace(SMALL, metric="loyalty"))
    assert loyal.uncompressed == loyal.value(Layerwise(keep_ratio=1.0)) == 1.0
    assert loyal.least(0.25) == 0.75
    answers = [loyal._answers(b, subject.encode(b.prompts)) for b in loyal.batches]
    right = ScheduleObjective(subject, replace(SMALL, metric="accuracy"))
    scores = {}
    for batch, own in zip(loyal.batches, answers, strict=True):
        for prompt, answer in zip(batch.prompts, own, strict=True):
            scores.setdefault(batch.task, []).append(float(answer == prompt.answer))
    assert right.uncompressed == pytest.approx(sum(map(sum, scores.values())) / 6)
    blind = loyal.value(NoImage())
    assert 0.0 <= blind <= 1.0
    assert round(blind * 6) == pytest.approx(blind * 6)


def test_costs_are_shares_of_all_visual_tokens(objective):
    half = Layerwise(layers=(2,), ratios=(0.5,))
    assert objective.num_visual == 144
    assert objective.share_of_tokens(half) == 0.75
    d, m = objective._text.hidden_size, objective._text.intermediate_size

    def cost(n):
        return 4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m

    assert objective.share_of_flops(half) == pytest.approx((cost(144) + cost(72)) / 2 / cost(144))


@pytest.mark.slow
def test_a_stopped_search_goes_on_without_the_model(subject, tmp_path, monkeypatch):
    log, make = tmp_path / "values.jsonl", scheduled("layerwise")
    first = search_greedy(ScheduleObjective(subject, SMALL, log), make, tolerance=0.05)
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:-1]) + '\n{"identity": "cut o')
    again = ScheduleObjective(subject, SMALL, log)
    assert len(again._known) == len(lines) - 1
    log.write_text("\n".join(lines) + "\n")
    last = ScheduleObjective(subject, SMALL, log)
    monkeypatch.setattr(last, "_outputs", None)
    monkeypatch.setattr(ScheduleObjective, "uncompressed", 0.0)
    assert search_greedy(last, make, tolerance=0.05) == first
    # other questions: nothing of it counts
    assert not ScheduleObjective(subject, replace(SMALL, seed=1), log)._known


DAMAGED = [
    '{"identity": "cut o', "[]", "3", '"text"', "[" * 100_000, "\udcff",
    '{"identity": "me", "method": {}}',
    '{"identity": "me", "method": [], "value": 1.0}',
    '{"identity": "me", "method": {"deep": ' + '{"a": ' * 99 + "1" + "}" * 99 + '}, "value": 1.0}',
    *(
        '{"identity": "me", "method": {}, "value": ' + value + "}"
        for value in ("NaN", "1e999", "true", '"1"', "null", "1" + "0" * 400, "[1]")
    ),
]  # fmt: skip


def test_damaged_notes_are_left_out_and_spoil_none_behind_them(tmp_path):
    log = tmp_path / "values.jsonl"
    for line in DAMAGED:
        log.write_bytes(line.encode(errors="surrogateescape"))
        add_note(log, "me", {"method": "fastv"}, 0.5)
        add_note(log, "other", {"method": "fastv"}, 0.6)
        add_note(log, "me", {"method": "random"}, float("nan"))
        assert list(read_notes(log, "me")) == [('{"method": "fastv"}', 0.5)], line


def test_notes_that_cannot_be_kept_are_named(tmp_path):
    with pytest.raises(ResultsError, match="cannot write"):
        add_note(tmp_path / "nowhere" / "values.jsonl", "me", {}, 0.5)
    with pytest.raises(ResultsError, match="cannot read"):
        list(read_notes(tmp_path, "me"))


@pytest.mark.slow
def test_what_is_found_is_a_file_that_compresses(objective, tmp_path):
    found = search_greedy(objective, scheduled("layerwise"), tolerance=0.05)
    assert found.value >= objective.least(0.05)
    found.save(path := tmp_path / "schedule.yaml", objective, "greedy")
    assert path.read_text().startswith("# vispress search greedy: kl ")
    assert load_config(path) == found.method
    model = objective.loaded.model
    compress_model(model, config=path)
    model(**objective.loaded.encode(objective.batches[0].prompts))
    (image,) = compression_report(model).samples[0].images
    remove_compression(model)
    mean = sum(compression_report_counts(image, objective.num_layers)) / objective.num_layers
    assert mean / 144 == pytest.approx(found.tokens)


def compression_report_counts(image, num_layers):
    """Visual tokens that enter each layer."""
    counts = [image.num_visual] * num_layers
    for placement in image.placements:
        counts[placement.layer :] = [placement.num_kept] * (num_layers - placement.layer)
    return counts


# --- sigmoid


@pytest.mark.slow
def test_the_best_sigmoid_meets_its_budget_and_goes_on(objective, tmp_path):
    storage = tmp_path / "trials.journal"
    asked = []
    objective.advance = lambda what, _n: asked.append(what.partition(",")[0])
    first = search_sigmoid(objective, 0.6, trials=3, storage=storage)
    assert first.tokens == pytest.approx(0.6, abs=0.02)
    assert first.value >= objective.value(Layerwise(keep_ratio=0.6)) - 1e-6
    more = search_sigmoid(objective, 0.6, trials=10, storage=storage)
    assert more.value >= first.value
    tried = {what for what in asked if what.startswith("trial ")}
    assert tried == {f"trial {i}" for i in range(10)}
    assert search_sigmoid(objective, 0.6, trials=10, storage=storage) == more


def test_a_budget_of_flops_is_met_too(objective):
    found = search_sigmoid(objective, 0.7, "flops", trials=2)
    assert found.flops == pytest.approx(0.7, abs=0.02)
    assert found.method.midpoint is not None


def test_the_seed_decides_the_trials(objective):
    one, two = (search_sigmoid(objective, 0.6, trials=4, seed=3) for _ in range(2))
    assert one == two


def test_a_budget_that_no_sigmoid_meets_is_refused(objective):
    with pytest.raises(BudgetError, match=r"none of 2 sigmoids meets 0\.05 of tokens"):
        search_sigmoid(objective, 0.05, trials=2)
    with pytest.raises(BudgetError, match="share must be"):
        search_sigmoid(objective, 1.5, trials=2)


def test_without_optuna_the_extra_is_named(objective, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'vispress\[search\]'"):
        search_sigmoid(objective, 0.6, trials=1)
