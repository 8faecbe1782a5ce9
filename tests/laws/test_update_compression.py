"""`update_compression` is compressing anew: same bits, same hooks, caches that go on, or a refusal.

Every way through the runtime starts with another budget (methods that take none: with another
hyper-parameter) and is updated to that of the table.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from tests.laws.cases import (
    BUDGETED,
    CASES,
    DROPPING,
    FAMILIES,
    VIDEO_CASES,
    VIDEO_ONLY,
    VIDEO_SAMPLES,
    cases,
    greedy,
    inputs_of,
    logits_of,
    make,
    make_inputs,
    model_of,
    settings,
)
from tests.laws.masked import masked_model
from tests.laws.oracle import oracle_expand
from tests.laws.test_law03_removal import Snapshot
from tests.laws.test_law10_training import checkpointing, training
from tests.tiny import Image, Sample, Text
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache

from vispress import (
    compress_model,
    compressed,
    compression_report,
    remove_compression,
    update_compression,
)
from vispress.adapters.base import find_adapter
from vispress.errors import (
    BudgetError,
    CompressionStateError,
    ConfigError,
    UnsupportedMethodError,
)
from vispress.methods import DivPrune, FastV, PyramidDrop
from vispress.runtime.attachment import ATTRIBUTE, Attachment
from vispress.runtime.forward.model_call import capture_of
from vispress.runtime.kv_cache.hf_compat import CACHE, cache_of
from vispress.runtime.stages.base import RuntimeStage

BEFORE: dict[str, dict[str, Any]] = {"cmai": {"mass": 0.4}}
AFTER: dict[str, dict[str, Any]] = {"cmai": {"mass": 0.7}}
"""By method: others change their ratio."""
UPDATED = [case for case in CASES if case in BUDGETED or case[1] in BEFORE]


def old(method: str) -> dict[str, Any]:
    return BEFORE.get(method, {"keep_ratio": 0.8})


def new(method: str) -> dict[str, Any]:
    return AFTER.get(method, {"keep_ratio": 0.4})


def attachment_of(model: Any) -> Attachment:
    return find_adapter(model).base.__dict__[ATTRIBUTE]  # type: ignore[no-any-return]


def prompts(family: str, method: str) -> dict[str, Any]:
    if method in VIDEO_ONLY:
        return make_inputs(family, VIDEO_SAMPLES, padding="left")
    return inputs_of(family)


@contextmanager
def before(family: str, method: str) -> Iterator[Any]:
    """A model that keeps more than the table's case does."""
    model = model_of(family)
    compress_model(model, method, **settings(family, method) | old(method))
    try:
        yield model
    finally:
        remove_compression(model)


def facts(model: Any, inputs: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors and numbers that must not tell an updated model from a fresh one."""
    found = [logits_of(model, inputs)]
    report = compression_report(model)
    found += [report.alive(layer) for layer in range(report.num_layers)]
    found += greedy(model, inputs, 2)
    return found, report.to_dict()


def assert_same(got: Any, expected: Any) -> None:
    assert got[1] == expected[1]
    assert all(torch.equal(a, b) for a, b in zip(got[0], expected[0], strict=True))


def an_updated_model_is_one_compressed_anew(family: str, method: str) -> None:
    model, inputs = model_of(family), prompts(family, method)
    plain = logits_of(model, inputs)
    untouched = Snapshot(model)
    with compressed(model, method, **settings(family, method) | new(method)):
        expected = facts(model, inputs)
    with before(family, method):
        first, hooks = logits_of(model, inputs), Snapshot(model)
        footprint = attachment_of(model)._footprint
        assert update_compression(model, **new(method)) is model
        if attachment_of(model)._footprint is footprint:
            assert hooks.differences() == []
        assert_same(facts(model, inputs), expected)
    if (family, method) in DROPPING:
        assert not torch.equal(first, expected[0][0])
    untouched.assert_same()
    assert torch.equal(logits_of(model, inputs), plain)


class Updating(LogitsProcessor):  # type: ignore[misc]
    """Calls a function ahead of the second token that `generate` chooses."""

    def __init__(self, update: Callable[[], object]) -> None:
        self.update, self.steps = update, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps += 1
        if self.steps == 1:
            self.update()
        return scores


def answer(model: Any, inputs: dict[str, Any], update: Callable[[], object], **more: Any) -> Any:
    return model.generate(
        **inputs, logits_processor=LogitsProcessorList([Updating(update)]), max_new_tokens=4,
        min_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True, **more,
    )  # fmt: skip


def a_cache_filled_before_goes_on_as_it_was(family: str, method: str) -> None:
    inputs = prompts(family, method)
    with before(family, method) as model:
        expected = answer(model, inputs, lambda: None)
        remembers = attachment_of(model).plan.remembering.methods
    with before(family, method) as model:
        if remembers:
            with pytest.raises(CompressionStateError, match=f"{type(remembers[0]).__name__}.*back"):
                answer(model, inputs, lambda: update_compression(model, **new(method)))
            update_compression(model, **old(method))  # by value: the cache's setting again
            out = answer(model, inputs, lambda: update_compression(model, **old(method)))
        else:
            out = answer(model, inputs, lambda: update_compression(model, **new(method)))
            assert cache_of(out).get_seq_length() == cache_of(expected).get_seq_length()
        fresh = logits_of(model, inputs)
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))
    kept = old(method) if remembers else new(method)
    with compressed(model, method, **settings(family, method) | kept):
        assert torch.equal(fresh, logits_of(model, inputs))


CHECKS = {
    "anew": an_updated_model_is_one_compressed_anew,
    "cache": a_cache_filled_before_goes_on_as_it_was,
}


@pytest.mark.parametrize(
    ("family", "method", "check"),
    [
        case
        for among in (UPDATED, VIDEO_CASES)
        for case in cases("update", among, turning=[*CHECKS])
    ],
)
def test_every_way(family: str, method: str, check: str) -> None:
    CHECKS[check](family, method)


@pytest.mark.parametrize("method", ["fastv", "divprune", "attended_cache"])
@pytest.mark.parametrize("beams", [1, 3])
def test_beams_and_static_caches_go_on_too(method: str, beams: int) -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    room = inputs["input_ids"].shape[1] + 8
    static = method != "attended_cache"

    def cache() -> dict[str, Any]:
        if not static or beams > 1:
            return {"num_beams": beams}
        return {CACHE: StaticCache(config=model.config.get_text_config(), max_cache_len=room)}

    with before("llava", method):
        expected = answer(model, inputs, lambda: None, **cache())
        got = answer(model, inputs, lambda: update_compression(model, **new(method)), **cache())
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "divprune"])
@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_a_new_image_on_an_old_cache_gets_the_new_budget(family: str, method: str) -> None:
    first = make_inputs(family, [Sample([Text(4), Image(4, 4), Text(5)])])
    second = make_inputs(family, [Sample([Text(3), Image(4, 6), Text(6)])], seed=5)
    mask = torch.ones_like(torch.cat([first["input_ids"], second["input_ids"]], dim=1))
    n, cache, full = first["input_ids"].shape[1], DynamicCache(), DynamicCache()
    with before(family, method) as model, torch.no_grad():
        model(**first, **{CACHE: cache})
        one = compression_report(model)
        update_compression(model, **new(method))
        got = model(**(second | {"attention_mask": mask}), **{CACHE: cache}).logits
        report = compression_report(model)
    alive = [report.alive(layer) for layer in range(report.num_layers)]
    assert all(torch.equal(a[:, :n], one.alive(layer)) for layer, a in enumerate(alive))
    with compressed(model, make(family, method, **new(method))) as fresh, torch.no_grad():
        model(**second)
        assert report.samples[0].images[0].num_kept == fresh.samples[0].images[0].num_kept
    positions = make(family, method).default_positions
    with masked_model(model, [*alive, mask.bool()], positions), torch.no_grad():
        model(**first, **{CACHE: full})
        expected = model(**(second | {"attention_mask": mask}), **{CACHE: full}).logits
    assert (got - oracle_expand(expected, alive[-1][:, n:])).abs().max() < 1e-5


def test_hooks_follow_to_other_layers() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    logits_of(model, inputs)
    untouched = Snapshot(model)
    for method, first, later in (
        ("fastv", {"layer": 2, "keep_ratio": 0.5}, {"layer": 4}),
        ("transprune", {"layers": (2, 3, 4)}, {"layers": (3, 4, 5)}),
        ("visionzip", {"keep_ratio": 0.5}, {"keep_ratio": 0.3}),
        ("lvlm_csp", {"keep_ratio": 0.5}, {"keep_ratio": 0.3}),
        ("tome", {"keep_ratio": 0.5}, {"keep_ratio": 0.3}),
    ):
        with compressed(model, method, **(first | later)):
            expected, fresh = facts(model, inputs), Snapshot(model)
        with compressed(model, method, **first):
            footprint = attachment_of(model)._footprint
            update_compression(model, **later)
            moved = attachment_of(model)._footprint is not footprint
            assert moved == ("keep_ratio" not in later)
            assert_same(facts(model, inputs), expected)
            assert len(Snapshot(model).seen) == len(fresh.seen)
        untouched.assert_same()


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({}, BudgetError, "nothing to update.*keep_ratio"),
        ({"keep_ratio": 1.5}, BudgetError, r"keep_ratio.*\(0, 1\].*1.5"),
        ({"num_tokens": 0}, BudgetError, "num_tokens.*at least 1.*0"),
        ({"keep_ratio": 0.3, "num_tokens": 4}, BudgetError, "one budget.*keep_ratio and num"),
        ({"mean_keep_ratio": 0.01}, BudgetError, "mean_keep_ratio"),
        ({"layer": 77}, ConfigError, r"layer.*\[1, 6\).*77"),
        ({"layr": 3}, ConfigError, "did you mean 'layer'"),
        ({"positions": "compact"}, ConfigError, "no hyper-parameter 'positions'"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    given: dict[str, Any], error: type[Exception], match: str
) -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    with compressed(model, "fastv", keep_ratio=0.5, layer=2):
        expected, held = facts(model, inputs), Snapshot(model)
        plan = attachment_of(model).plan
        with pytest.raises(error, match=match):
            update_compression(model, **given)
        assert attachment_of(model).plan is plan
        assert held.differences() == []
        assert_same(facts(model, inputs), expected)


def test_a_failure_while_hooks_move_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of("llava"), inputs_of("llava")

    def fail() -> Any:
        raise KeyboardInterrupt

    make_plan = Attachment.update

    def failing(self: Attachment, plan: Any, stages: Any, request: Any) -> None:
        last = RuntimeStage(carries=frozenset(), open=stages[0].open, order=99, install=fail)
        make_plan(self, plan, (*stages, last), request)

    with compressed(model, "fastv", keep_ratio=0.5, layer=2):
        expected, held = facts(model, inputs), Snapshot(model)
        monkeypatch.setattr(Attachment, "update", failing)
        with pytest.raises(KeyboardInterrupt):
            update_compression(model, layer=4)
        assert len(Snapshot(model).seen) == len(held.seen)
        assert_same(facts(model, inputs), expected)


def test_signals_that_a_model_lacks_are_refused() -> None:
    model = model_of("llava_onevision")  # SigLIP has no [CLS]
    with compressed(model, "fastervlm", keep_ratio=0.5, scores="column_mean"):
        with pytest.raises(UnsupportedMethodError, match="column_mean"):
            update_compression(model, scores="cls")
        logits_of(model, inputs_of("llava_onevision"))


def test_a_chain_takes_the_mean_that_it_shares() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    with compressed(model, ["divprune", "fastv"], mean_keep_ratio=0.3):
        expected = facts(model, inputs)
    with compressed(model, ["divprune", "fastv"], mean_keep_ratio=0.5):
        update_compression(model, mean_keep_ratio=0.3)
        assert_same(facts(model, inputs), expected)
        with pytest.raises(ConfigError, match=r"divprune, fastv.*mean_keep_ratio.*remove_compr"):
            update_compression(model, keep_ratio=0.3)
        with pytest.raises(BudgetError, match="mean_keep_ratio"):
            update_compression(model, mean_keep_ratio=1.5)
        assert_same(facts(model, inputs), expected)
    chain = [DivPrune(keep_ratio=0.6), FastV(keep_ratio=0.5, layer=2)]
    refusal = pytest.raises(ConfigError, match=r"budgets of their own.*remove_compression")
    with compressed(model, chain), refusal:
        update_compression(model, mean_keep_ratio=0.3)


def test_what_is_not_given_stays() -> None:
    model, inputs = model_of("llava"), inputs_of("llava")
    with compressed(model, FastV(layer=4, num_tokens=5), positions="original", backend="torch"):
        update_compression(model, mean_keep_ratio=0.8)
        assert attachment_of(model).methods == (FastV(layer=4, mean_keep_ratio=0.8),)
        (bound,) = attachment_of(model).plan.placements
        assert (bound.positions, attachment_of(model).plan.backend) == ("original", "torch")
        logits_of(model, inputs)
    with compressed(model, PyramidDrop()):  # the published schedule, then the same shape's mean
        update_compression(model, keep_ratio=0.4)
        logits_of(model, inputs)
        assert compression_report(model).mean_keep_ratio == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_a_compressed_model_between_calls(family: str) -> None:
    model, inputs = model_of(family), inputs_of(family)
    with pytest.raises(CompressionStateError, match="not compressed"):
        update_compression(model, keep_ratio=0.5)
    layer: Any = find_adapter(model).decoder_layers[1]
    with compressed(model, "fastv", keep_ratio=0.5):
        expected = logits_of(model, inputs)
        update = partial(update_compression, model, layer=3)
        handle = layer.register_forward_pre_hook(lambda *_: update() and None)
        with pytest.raises(CompressionStateError, match="under way"):
            logits_of(model, inputs)
        handle.remove()
        assert torch.equal(logits_of(model, inputs), expected)


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["fastv", "cmai"])
def test_a_checkpointed_call_runs_again_as_it_ran(method: str, reentrant: bool) -> None:
    model, inputs = model_of("llava"), inputs_of("llava")

    def gradient(update: Callable[[], object]) -> Tensor:
        model.zero_grad()
        with training(model):
            loss = model(**inputs).logits.square().mean()
            update()
            loss.backward()
        return next(find_adapter(model).decoder_layers[0].parameters()).grad.clone()

    with compressed(model, method, **old(method)), checkpointing(model, reentrant=reentrant):
        expected = gradient(lambda: None)
        found = gradient(lambda: update_compression(model, **new(method)))
        assert torch.equal(found, expected)
        with pytest.raises(CompressionStateError, match="behind that"):
            gradient(lambda: update_compression(model, layer=4))
        update_compression(model, layer=4)
        gradient(lambda: None)


def test_features_of_another_plan_are_refused() -> None:
    """Of one that asked the same of the encoder they are as good."""
    model, pixels = model_of("llava"), inputs_of("llava")["pixel_values"]
    with compressed(model, "visionzip", keep_ratio=0.5), torch.no_grad():
        encoded = model.model.get_image_features(pixel_values=pixels)
        update_compression(model, keep_ratio=0.3)
        assert capture_of(attachment_of(model).plan, "image", encoded).counts
    refusal = pytest.raises(CompressionStateError, match="compressed otherwise")
    with compressed(model, "fastervlm", keep_ratio=0.5), refusal:
        capture_of(attachment_of(model).plan, "image", encoded)
