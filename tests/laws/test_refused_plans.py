"""What can never work on any call is refused when a model is compressed, and only that."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from tests.laws.cases import FAMILIES, METHODS, VIDEO_ONLY, VIDEO_SAMPLES, fits, make, model_of
from tests.laws.table import logits_of
from tests.tiny import Image, Sample, Text, make_inputs

from vispress import compress_model, compressed, remove_compression
from vispress.adapters.base import find_adapter
from vispress.errors import ConfigError, VispressError
from vispress.methods import FastV, Random
from vispress.methods.base import Compressor
from vispress.runtime.plan import placements as placements_file
from vispress.types import Placement, Queries, Signal, Stage, TokenPlan, VisualTokens

FIRST = Random(keep_ratio=0.5)


def _home(method: str) -> str:
    return next(family for family in FAMILIES if fits(family, method))


def _fails(family: str, chain: list[Compressor], inputs: Mapping[str, Any]) -> bool:
    """Whether the chain, once on the model, cannot run."""
    model = model_of(family)
    with compressed(model, chain):
        try:
            logits_of(model, inputs)
        except VispressError:
            return True
    return False


def _refusal(family: str, chain: list[Compressor]) -> str | None:
    """What `compress_model` says of a chain that it does not take."""
    try:
        with compressed(model_of(family), chain):
            return None
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("method", METHODS)
def test_a_chain_is_refused_at_once_exactly_if_it_never_works(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = _home(method)
    samples = VIDEO_SAMPLES[:1] if method in VIDEO_ONLY else [Sample([Text(3), Image(), Text(4)])]
    chain, inputs = [FIRST, make(family, method)], make_inputs(family, samples)
    message = _refusal(family, chain)
    if message is None:
        assert not _fails(family, chain, inputs)
        return
    assert method in message
    if "order the chain" not in message:
        assert f"put {method} first" in message
        monkeypatch.setattr(placements_file, "_refuse_what_is_gone", lambda *_: None)
        assert _fails(family, chain, inputs)


def test_a_member_that_acts_on_whole_images_counts() -> None:
    assert any(make(_home(name), name).whole_only() for name in METHODS)
    chain = [FIRST, make("llava", "uniform", dims=2)]
    with pytest.raises(ConfigError, match="uniform acts on whole images, of which random"):
        compress_model(model_of("llava"), chain)


@dataclass(frozen=True, kw_only=True)
class Reads(Compressor):
    """Reads what the test says, where it says."""

    name: ClassVar[str] = "reads"
    summary: ClassVar[str] = "reads"
    paper: ClassVar[str] = "control"

    wants: frozenset[Signal] = frozenset({Signal.QUERY_ATTENTION})
    where: Mapping[str, Any] = field(default_factory=dict)

    def signals(self) -> frozenset[Signal]:
        return self.wants

    def placements(self, num_layers: int) -> tuple[Placement, ...]:
        given = {"stage": Stage.IN_LLM, "layer": 2, **self.where}
        return (Placement(budget=self.budget(num_layers), **given),)

    def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
        raise AssertionError("never asked")


NORMS = frozenset({Signal.KEY_NORMS})


@pytest.mark.parametrize(
    ("match", "wants", "where"),
    [
        ("set Placement.queries", None, {}),
        ("set Placement.transitions", frozenset({Signal.TRANSITION}), {}),
        (r"\[0, 2\), got 2", frozenset({Signal.TRANSITION}), {"transitions": (1, 2)}),
        (
            "no layer has moved",
            frozenset({Signal.UPDATE_NORM}),
            {"stage": Stage.PRE_LLM, "layer": 0},
        ),
        ("no layer has run", None, {"stage": Stage.PRE_LLM, "layer": 0, "queries": Queries.LAST}),
        (
            "of one layer, got attention_depth=2",
            NORMS,
            {"queries": Queries.LAST, "attention_depth": 2},
        ),
        ("2 layers to read", None, {"queries": Queries.LAST, "attention_depth": 3}),
        ("attention_depth=0", None, {"queries": Queries.LAST, "attention_depth": 0}),
        (r"must be in \[3, 6\]", None, {"queries": Queries.LAST, "until": 2}),
        (r"must be in \[3, 6\]", None, {"queries": Queries.LAST, "until": 7}),
    ],
)
def test_a_placement_that_reads_what_no_call_has_is_refused_with_the_setting(
    match: str, wants: frozenset[Signal] | None, where: dict[str, Any]
) -> None:
    model = model_of("llava")
    more = {} if wants is None else {"wants": wants}
    with pytest.raises(ConfigError, match=match):
        compress_model(model, Reads(keep_ratio=0.5, where=where, **more))
    compress_model(model, FastV(keep_ratio=0.5))  # nothing was left behind
    remove_compression(model)
    assert not find_adapter(model).base.__dict__.get("_vispress_attachment")
