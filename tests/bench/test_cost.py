"""Costs: what is timed, in which turns, and what choosing costs beyond compression."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar, final

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vispress.api import compress_model, compressed, remove_compression
from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.plan.downsample import Downsample
from vispress.bench.plan.plan import Timing
from vispress.bench.tasks.task import get_task
from vispress.bench.timing.cost import TIMES, in_rounds, measure_cost, timed_batch
from vispress.bench.timing.replay import Replay, recorders, replays
from vispress.bench.timing.timer import Marks, Sample, Timer, marked, timed_generate
from vispress.config import make_compressor
from vispress.errors import BudgetError
from vispress.flops import flops
from vispress.methods.base import Compressor
from vispress.methods.random_ import Random
from vispress.registry import get_method, list_methods
from vispress.types import Placement, TokenPlan, VisualTokens

CPU = torch.device("cpu")
EXTRA = 700
"""Operations that `Slow` does for nothing."""
STEP = 2.0**-10
"""Seconds; sums of it are exact."""


class Operations(TorchDispatchMode):
    """A timer that does not depend on the machine: each operation takes `STEP` seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))

    @property
    def timer(self) -> Timer:
        return Timer(CPU, now=lambda: self.count * STEP)


@final
@dataclass(frozen=True, kw_only=True)
class Slow(Compressor):
    """What `random` keeps, after work for nothing."""

    name: ClassVar[str] = "slow"

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        return Random(keep_ratio=self.keep_ratio).placements(num_layers)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        work = torch.zeros(3)
        for _ in range(EXTRA - 1):
            work = torch.sin(work)
        return Random(keep_ratio=self.keep_ratio).plan(tokens, num_keep)


def ticking():
    """A timer that shows 0, 1, 2... ms."""
    seen = iter(range(1000))
    return Timer(CPU, now=lambda: next(seen) / 1e3)


@pytest.fixture(scope="module")
def prompts(subject):
    return timed_batch(subject, get_task("count").draw(4, 0), 2)


@pytest.fixture
def measure(subject, prompts, make_plan):
    """Costs by the timer that counts operations."""

    def run(*chain, subject=subject, picture=None, **timing):
        plan = make_plan(
            timing={"batch": 2, "rounds": 2, "repeats": 1, "decode_tokens": 2} | timing
        )
        with Operations() as operations:
            return measure_cost(
                subject, chain, prompts, plan, picture=picture, timer=operations.timer
            )

    return run


# --- what is timed


def test_the_parts_of_a_run_lie_between_their_marks(subject, prompts):
    sample = timed_generate(subject.model, subject.encode(prompts), 3, ticking())
    # 0 start, 1 encoder, 2 encoder done, 3 language model, 4 first token, 5, 6, 7
    assert sample == Sample(
        encoder_ms=pytest.approx(1),
        prefill_ms=pytest.approx(1),
        ttft_ms=pytest.approx(4),
        decode_ms=pytest.approx(1),
    )


@pytest.mark.slow
def test_one_token_leaves_no_decoding_to_time(subject, prompts, measure):
    assert timed_generate(subject.model, subject.encode(prompts), 0, ticking()).decode_ms is None
    cost = measure(Random(keep_ratio=0.5), decode_tokens=0)
    assert cost["decode_ms"] is cost["uncompressed_decode_ms"] is cost["decode_ratio"] is None
    assert cost["ttft_ms"]["median"] > 0


def test_a_video_method_that_calls_the_image_method_counts_once():
    marks = Marks(ticking())
    marks.features(lambda: marks.features(lambda: None))
    assert len(marks.encoder) == 1
    with pytest.raises(KeyError):
        marks.features(lambda: {}["missing"])
    marks.features(lambda: None)  # an error leaves the marks usable
    assert len(marks.encoder) == 3


@pytest.mark.parametrize("method", [None, "fastervlm"])
def test_compression_inside_encoder_and_prefill_is_timed_there(subject, prompts, method):
    """Marks lie outside of what compression adds, and nothing of them stays."""
    model, inputs = subject.model, subject.encode(prompts)
    with Operations() as operations:
        plain = timed_generate(model, inputs, 1, operations.timer)
        with compressed(model, "fastervlm", keep_ratio=0.5) if method else nullcontext():
            before = model.model.__dict__.get("get_image_features")
            sample = timed_generate(model, inputs, 1, operations.timer)
            assert model.model.__dict__.get("get_image_features") is before
    if method:
        assert sample.encoder_ms > plain.encoder_ms  # the [CLS] rows
        assert sample.prefill_ms > plain.prefill_ms  # fewer rows, more operations
    else:
        assert sample == plain


def test_marks_are_taken_off_after_an_error(subject):
    model = subject.model
    hooks = len(model.model.language_model._forward_pre_hooks)
    with pytest.raises(KeyError), marked(model, ticking()):
        raise KeyError
    assert "get_image_features" not in model.model.__dict__
    assert len(model.model.language_model._forward_pre_hooks) == hooks


# --- turns


def test_variants_take_turns_there_and_back_and_the_first_are_not_counted():
    order, inside = [], []

    @contextmanager
    def entered(name):
        inside.append(name)
        yield
        inside.pop()

    def run(name):
        assert inside == [name]
        order.append(name)
        return len(order)

    variants = {name: lambda name=name: entered(name) for name in "abc"}
    rounds = in_rounds(variants, run, Timing(rounds=3, repeats=2))
    assert order == [*"aaabbbccc", *"cccbbbaaa", *"aaabbbccc"]
    assert [{name: one[name] for name in "abc"} for one in rounds] == [
        {"c": [11, 12], "b": [14, 15], "a": [17, 18]},
        {"a": [20, 21], "b": [23, 24], "c": [26, 27]},
    ]


def test_ratios_hold_on_a_machine_that_slows_down(subject, prompts, make_plan, monkeypatch):
    """Every round runs at half the speed of the one before; the compressed model takes 3/4."""
    taken = []

    def run(model, inputs, decode_tokens, timer):
        slow = 2.0 ** (len(taken) // 9)  # three variants, three runs each
        taken.append(None)
        attached = model.model.__dict__.get("_vispress_attachment")
        replayed = attached is not None and isinstance(attached.methods[0], Replay)
        own = 1.0 if attached is None else 0.7 if replayed else 0.75
        return Sample(
            encoder_ms=slow, prefill_ms=10 * slow * own, ttft_ms=12 * slow * own, decode_ms=slow
        )

    monkeypatch.setattr("vispress.bench.timing.cost.timed_generate", run)
    plan = make_plan(timing={"batch": 2, "rounds": 4, "repeats": 2})
    cost = measure_cost(subject, [Random(keep_ratio=0.5)], prompts, plan)
    for name, ratio in {"encoder": 1.0, "prefill": 0.75, "ttft": 0.75, "decode": 1.0}.items():
        assert list(cost[f"{name}_ratio"].values()) == pytest.approx([ratio] * 3)
    assert list(cost["overhead_share"].values()) == pytest.approx([0.05] * 3)
    # rounds of 2, 4 and 8: the first one, of 1, was warm-up
    assert cost["uncompressed_prefill_ms"]["median"] == 40
    assert cost["overhead_ms"]["median"] == pytest.approx(2)


# --- what choosing costs


@pytest.mark.slow
def test_the_uncompressed_model_against_itself_is_all_ones(measure):
    cost = measure()
    for name in TIMES:
        assert set(cost[f"{name}_ratio"].values()) == {1.0}
    assert cost["overhead_ms"] is cost["overhead_share"] is None
    assert cost["peak_bytes"] == cost["uncompressed_peak_bytes"] > 0
    assert cost["kv_bytes"] == cost["uncompressed_kv_bytes"]
    assert {found["ratio"] for found in cost["flops"].values()} == {1.0}


@pytest.mark.slow
def test_choosing_at_random_costs_next_to_nothing_and_extra_work_all_it_takes(measure):
    random, slow = measure(Random(keep_ratio=0.5)), measure(Slow(keep_ratio=0.5))
    assert 0 < random["overhead_ms"]["median"] < 30 * 1e3 * STEP
    assert abs(random["overhead_share"]["median"]) < 0.05
    extra = slow["overhead_ms"]["median"] - random["overhead_ms"]["median"]
    assert extra == pytest.approx(EXTRA * 1e3 * STEP)
    share = slow["overhead_share"]["median"] * slow["uncompressed_prefill_ms"]["median"]
    assert share == pytest.approx(slow["overhead_ms"]["median"])
    assert slow["decode_ms"] == random["decode_ms"]


@pytest.mark.slow
def test_reading_signals_is_part_of_choosing(measure):
    random = measure(Random(keep_ratio=0.5))["overhead_ms"]["median"]
    for method in ("fastv", "fastervlm", "visionzip", "transprune"):
        budget = {} if method == "transprune" else {"keep_ratio": 0.5}
        cost = measure(make_compressor(method, **budget))
        assert cost["overhead_ms"]["median"] > random, method


@pytest.mark.some(cases=4)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fastv", {"keep_ratio": 0.5}),
        ("visionzip", {"keep_ratio": 0.25}),
        ("transprune", {}),
        ("fourier", {"num_tokens": 36}),
        ("avg_pool", {"num_tokens": 36}),
        ("random", {"keep_ratio": 0.1, "seed": 3}),
        ("no_image", {}),
    ],
)
def test_a_replay_keeps_the_same_tokens_every_time(subject, prompts, method, options):
    chain, inputs = [make_compressor(method, **options)], subject.encode(prompts)
    recording, logs = recorders(chain)
    reports = []
    for one in (chain, recording, replays(chain, logs)):
        with compressed(subject.model, one) as view:
            for _ in range(2 if one is not recording else 1):
                subject.model.generate(**inputs, max_new_tokens=2, do_sample=False)
            reports.append(view.report)
    assert reports[0].samples == reports[1].samples == reports[2].samples
    assert reports[0].kv_bytes == reports[2].kv_bytes


@pytest.mark.some(cases=8)
@pytest.mark.parametrize("method", [m for m in list_methods() if get_method(m).needs is None])
def test_every_method_can_be_replayed(subject, prompts, method):
    budget = {"mean_keep_ratio": 0.6} if get_method(method).takes_budget else {}
    budget |= {"after": (1,)} if method == "pvc" else {}  # one encoder layer gives the features
    chain, inputs = [make_compressor(method, **budget)], subject.encode(prompts)
    if chain[0].gist_evictor() is not None:  # the word behind the picture is to stand for it
        (behind,) = {
            int((row == subject.model.config.image_token_index).nonzero()[-1]) + 1
            for row in inputs["input_ids"]
        }
        inputs["input_ids"][:, behind] = subject.model.get_input_embeddings().num_embeddings - 1
    recording, logs = recorders(chain)
    samples = []
    for one in (chain, recording, replays(chain, logs)):
        with compressed(subject.model, one) as view, torch.inference_mode():
            subject.model(**inputs)
            samples.append(view.report.samples)
    assert samples[0] == samples[1] == samples[2]


def test_a_replay_reads_nothing():
    chain = [make_compressor("transprune"), make_compressor("fastv", keep_ratio=0.5, layer=20)]
    for method, replayed in zip(chain, replays(chain, [[], []]), strict=True):
        asked, repeated = method.placements(32), replayed.placements(32)
        assert any(p.queries for p in asked)
        assert not any(p.queries or p.transitions for p in repeated)
        assert [(p.layer, p.budget) for p in repeated] == [(p.layer, p.budget) for p in asked]
        assert not replayed.signals()


def test_a_replayed_chain_keeps_positions_and_answers(subject, prompts):
    """FastV keeps position ids, random renumbers: each stand-in does as its method."""
    chain = [Random(keep_ratio=0.5), make_compressor("fastv", keep_ratio=0.5)]
    inputs, outputs = subject.encode(prompts), []
    recording, logs = recorders(chain)
    for one in (chain, recording, replays(chain, logs)):
        with compressed(subject.model, one), torch.inference_mode():
            outputs.append(subject.model(**inputs).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


# --- numbers beside times


def test_timed_prompts_have_as_many_pictures_and_words(subject):
    one, other = get_task("count").draw(2, 0)
    two = replace(other, images=other.images * 2)  # the same text, for what it counts here
    none = replace(one, images=())
    assert timed_batch(subject, [one, two, none, none, none], 3) == [one]
    assert timed_batch(subject, [none], 3) == []
    assert timed_batch(subject, [one, other], 0) == []


@pytest.mark.slow
def test_sizes_are_those_worked_out_by_hand(measure, subject):
    cost = measure(make_compressor("fastv", keep_ratio=0.5, layer=1))
    config = subject.model.config.text_config
    tokens, layers, width = cost["prompt_tokens"], config.num_hidden_layers, config.hidden_size
    assert cost["batch"] == 2
    assert cost["uncompressed_kv_bytes"] == 2 * layers * tokens * width * 4
    assert cost["kv_bytes"] == cost["uncompressed_kv_bytes"] - 2 * (layers - 1) * 72 * width * 4

    def layer(n):
        return 4 * n * width**2 + 2 * n**2 * width + 3 * n * width * config.intermediate_size

    macs = cost["flops"]["mac3"]
    assert macs["uncompressed"] == layers * layer(144)
    assert macs["compressed"] == layer(144) + (layers - 1) * layer(72)
    assert macs["ratio"] == pytest.approx(macs["compressed"] / macs["uncompressed"])
    assert cost["flops"]["flop3"]["compressed"] == 2 * macs["compressed"]
    assert 0 < cost["peak_bytes"] < cost["uncompressed_peak_bytes"]


@pytest.mark.slow
def test_smaller_pictures_are_measured_like_a_method(measure, subject):
    cost = measure(picture=Downsample(num_tokens=36))
    assert cost["overhead_ms"] is cost["overhead_share"] is None
    assert cost["uncompressed_kv_bytes"] - cost["kv_bytes"] == 2 * 4 * (144 - 36) * 192 * 4
    widths = subject.model.config.text_config
    macs = flops([36] * 4, widths.hidden_size, widths.intermediate_size)
    assert cost["flops"]["mac3"]["compressed"] == macs
    assert cost["flops"]["mac3"]["uncompressed"] > 4 * macs
    assert cost["peak_bytes"] < cost["uncompressed_peak_bytes"] / 2  # the encoder's shrinks too
    assert not subject.model.model.vision_tower._forward_pre_hooks


@pytest.mark.slow
def test_half_precision_models_are_measured(subject, measure):
    import copy

    model = copy.deepcopy(subject.model).to(torch.bfloat16)
    half = LoadedModel(subject.name, model, subject.processor, subject.weights)
    full = measure(Random(keep_ratio=0.5))
    cost = measure(Random(keep_ratio=0.5), subject=half)
    assert cost["kv_bytes"] == full["kv_bytes"] / 2
    assert 0.4 < cost["peak_bytes"] / full["peak_bytes"] < 0.75


@pytest.mark.slow
def test_a_failed_measurement_leaves_the_model_as_it_was(subject, prompts, make_plan, monkeypatch):
    plan = make_plan(timing={"batch": 1, "rounds": 2, "repeats": 1})
    with pytest.raises(BudgetError):
        measure_cost(subject, [make_compressor("divprune")], prompts, plan)
    chain = [make_compressor("divprune", keep_ratio=0.5)]
    with monkeypatch.context() as patched:
        patched.setattr("vispress.bench.timing.cost.peak_bytes", {}.__getitem__)
        with pytest.raises(TypeError):
            measure_cost(subject, chain, prompts, plan)
    compress_model(subject.model, chain)
    remove_compression(subject.model)
    assert measure_cost(subject, chain, prompts, plan)["batch"] == 2
