"""Graphs that a captured model holds: whose they are, when they go, what they leave behind."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.laws.capturing import (
    ONE,
    OTHER,
    batches,
    begun,
    generated,
    longer,
    prefill,
    same,
    step,
    taped,
)
from tests.laws.cases import make, model_of
from tests.laws.test_decode_cost import python_calls
from tests.tiny import build
from torch import nn

from vispress import (
    compress_model,
    compressed,
    compression_report,
    remove_compression,
    update_compression,
)
from vispress.runtime.graphs.backends import Tape, Tapes
from vispress.runtime.graphs.lodging import lodging_of

LITTLE = 0.25
"""Python calls around a graph, as a share of those of the call that it stands for."""


def test_layouts_take_turns_and_the_oldest_goes() -> None:
    model = model_of("llava")
    calls = [*batches("llava", ONE), *batches("llava", OTHER)]
    with compressed(model, make("llava", "fastv")):
        expected = [prefill(model, given) for given in calls]
        for most, recorded in ((2, 2), (1, 7)):
            with taped(model, max_graphs=most) as captured:
                for at in (0, 2, 1, 3, 2, 0, 3, 1):
                    assert same(prefill(model, calls[at]), expected[at])
                report = captured.report()
                assert (report.graphs, report.recorded) == (most, recorded)
                assert report.evicted == recorded - most


def test_what_a_call_gave_is_its_own() -> None:
    model, inputs = model_of("llava"), batches("llava", ONE)
    with compressed(model, make("llava", "fastv")), taped(model):
        first = prefill(model, inputs[0])
        kept = [tensor.clone() for tensor in first[0]]
        alive = compression_report(model).alive(5)
        before = alive.clone()
        prefill(model, inputs[1])
        assert all(torch.equal(a, b) for a, b in zip(first[0], kept, strict=True))
        assert torch.equal(alive, before)


def test_compression_may_change_beneath() -> None:
    model, inputs = build("llava"), batches("llava", ONE)
    plain = prefill(model, inputs[1])

    def of(**options: Any) -> Any:
        with compressed(model, "fastv", **options):
            return prefill(model, inputs[1])

    half, most = of(keep_ratio=0.5), of(keep_ratio=0.9)
    taught = inputs[1] | {"labels": torch.full_like(inputs[1]["input_ids"], -100)}
    taught["labels"][:, -4:] = 9  # they say where the prompt ends
    with compressed(model, "fastv", keep_ratio=0.5):
        told = prefill(model, taught)
    with taped(model) as captured:
        assert same(prefill(model, inputs[1]), plain)
        compress_model(model, "fastv", keep_ratio=0.5)
        assert same(prefill(model, inputs[1]), half)
        assert same(prefill(model, taught), told)
        update_compression(model, keep_ratio=0.9)
        assert same(prefill(model, inputs[1]), most)
        remove_compression(model)
        assert same(prefill(model, inputs[1]), plain)
        assert captured.report().prefills == 4
    assert "forward" not in model.__dict__


def test_weights_may_change_beneath() -> None:
    model, (inputs, _) = build("llava"), batches("llava", ONE)
    with taped(model) as captured:
        before = prefill(model, inputs)
        with torch.no_grad():
            model.lm_head.weight.mul_(2.0)
        doubled = prefill(model, inputs)
        assert torch.equal(doubled[0][0], 2.0 * before[0][0])
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() / 2.0)
        captured.remove()
    with taped(model) as captured:
        assert same(prefill(model, inputs), before)
        with torch.no_grad():
            model.lm_head.weight.data = 2.0 * model.lm_head.weight
        assert same(prefill(model, inputs), doubled)
        assert captured.report().recorded == 2


def test_threads_share_a_captured_model() -> None:
    model = model_of("llava")
    calls = [*batches("llava", ONE), *batches("llava", OTHER)]
    with compressed(model, make("llava", "fastv")):
        expected = [generated(model, given).sequences for given in calls]
        with taped(model), ThreadPoolExecutor(4) as pool:
            for _ in range(2):
                found = pool.map(lambda given: generated(model, given).sequences, calls)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize("method", [None, "divprune", "fastv"])
def test_around_a_graph_python_has_little_to_do(
    method: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (inputs, _) = build("llava", layers=32, dtype=torch.float32), batches("llava", ONE)
    inputs["pixel_values"] = inputs["pixel_values"].float()

    def calls() -> tuple[int, int]:
        with torch.inference_mode():
            cache, mask = begun(model, inputs)
            step(model, cache, longer(mask))
            first = python_calls(lambda: begun(model, inputs))
            return first, python_calls(lambda: step(model, cache, longer(mask, 2)))

    if method:
        compress_model(model, make("llava", method))
    eager = calls()
    with taped(model) as captured:
        calls()
        monkeypatch.setattr(Tape, "replay", lambda tape: None)
        found = calls()
        assert not captured.fallbacks
    for some, all_of_them in zip(found, eager, strict=True):
        assert some <= LITTLE * all_of_them


class BrokenError(Exception):
    """What a test throws."""


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
def test_an_error_amid_a_recording_leaves_the_next_call_right(error: type[BaseException]) -> None:
    model, inputs = build("llava"), batches("llava", ONE)
    with compressed(model, "fastv", keep_ratio=0.5):
        expected = [prefill(model, given) for given in inputs]
        with taped(model) as captured:
            for after in (0, 1, 2):
                captured.drop()
                calls = iter(range(10))

                def breaks(module: Any, args: Any, after: int = after, calls: Any = calls) -> None:
                    if next(calls) >= after:
                        raise error

                hook = model.model.language_model.layers[3].register_forward_pre_hook(breaks)
                with pytest.raises(error):
                    prefill(model, inputs[0])
                hook.remove()
                for given, wanted in zip(inputs, expected, strict=True):
                    assert same(prefill(model, given), wanted)
        assert same(prefill(model, inputs[0]), expected[0])


def test_graphs_go_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (inputs, _), (other, _) = build("llava"), batches("llava", ONE), batches("llava", OTHER)
    expected = prefill(model, other)

    def fails(tapes: Any, run: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("out of memory")

    with taped(model) as captured:
        prefill(model, inputs)
        monkeypatch.setattr(Tapes, "record", fails)
        assert same(prefill(model, other), expected)
        assert captured.report().graphs == 0
        assert captured.fallbacks == {"recording failed: out of memory": 1}


def test_removal_leaves_nothing() -> None:
    model, (inputs, _) = build("llava"), batches("llava", ONE)
    prefill(model, inputs)
    before = [dict(vars(module)) for module in model.modules()]
    captured = taped(model)
    cache, mask = begun(model, inputs)
    step(model, cache, longer(mask))
    assert lodging_of(cache) is not None
    captured.remove()
    captured.remove()
    assert lodging_of(cache) is None
    assert [dict(vars(module)) for module in model.modules()] == before
    assert captured.report().graphs == 0


def test_a_copy_of_a_captured_model_is_not_captured() -> None:
    model, (inputs, _) = build("llava"), batches("llava", ONE)
    with compressed(model, "fastv", keep_ratio=0.5):
        expected = prefill(model, inputs)
        with taped(model) as captured:
            prefill(model, inputs)
            twin = copy.deepcopy(model)
            assert same(prefill(twin, inputs), expected)
            assert captured.report().prefills == 1
            with taped(twin) as other:
                assert same(prefill(twin, inputs), expected)
                assert other.report().prefills == 1
            assert same(prefill(twin, inputs), expected)
