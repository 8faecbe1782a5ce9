"""What every registered method promises of its settings; of its plans, see `test_contract`."""

import dataclasses
import pickle
from pathlib import Path

import pytest
from tests.methods.test_contract import (
    BUDGETED,
    BUILT_IN,
    METHODS,
    named,
    variants,
)

from vispress.config import load_config
from vispress.errors import BudgetError, ConfigError
from vispress.methods.base import Compressor
from vispress.methods.encoder_merger import EncoderMerger
from vispress.methods.encoder_pooler import EncoderPooler
from vispress.registry import get_method
from vispress.types import Signal, Stage

CONFIGS = Path(__file__).parents[2] / "configs" / "methods"
FROM_FIRST = (Stage.SKIP, Stage.CACHE, Stage.COMPUTE)
"""Stages that may act in layer 0."""


# --- placements and budgets


@pytest.mark.parametrize("name", METHODS)
def test_placements_fit_the_depth(name):
    for num_layers in (4, 5, 28, 32, 80):
        with named(f"{num_layers} layers"):
            check_placements(get_method(name), num_layers)


def check_placements(cls, num_layers):
    """Placements lie in the depth, in order, and read what the method says it reads."""
    try:
        placements = cls().placements(num_layers)
    except BudgetError:
        placements = cls(keep_ratio=0.5).placements(num_layers)
    inside = [p for p in placements if p.stage is Stage.ENCODER]
    assert len(inside) == issubclass(cls, EncoderMerger | EncoderPooler)
    assert placements[: len(inside)] == tuple(inside)
    placements = placements[len(inside) :]
    layers = [p.layer for p in placements]
    assert layers == sorted(set(layers))
    for p in placements:
        first = p.layer == 0  # layers may be skipped, and caches cut, from the first one on
        assert first if p.stage is Stage.PRE_LLM else not first or p.stage in FROM_FIRST
        assert 0 <= p.layer < num_layers
        assert list(p.transitions) == sorted(set(p.transitions))
        assert all(0 <= done < p.layer for done in p.transitions)
        assert bool(p.transitions) == (Signal.TRANSITION in cls.reads)
        read = cls.reads & {Signal.QUERY_ATTENTION, Signal.KEY_NORMS}
        # CATP's last placement compares hidden states alone
        reads_none = not read or p.stage in (Stage.PRE_LLM, Stage.SKIP) or p.images == "last"
        if p.probe is not None:
            assert p.queries is not None
            assert 0 <= p.probe < num_layers
            continue
        assert (p.queries is None) == reads_none
        assert p.layer >= p.attention_depth or p.queries is None
    for size in (1, 2, 37, 576):
        counts = [p.budget.resolve(size) for p in placements if p.until is None]
        assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("budget", [{"keep_ratio": 0.6}, {"mean_keep_ratio": 0.6}], ids=str)
@pytest.mark.parametrize("name", BUDGETED)
def test_the_mean_over_layers_is_what_was_asked(name, budget):
    method, size, depth = get_method(name)(**budget), 10_000, 32
    placements = method.placements(depth)
    if (
        name in ("dart", "debias", "fastv", "per_image", "random_mix", "sd_rpn")
        and "keep_ratio" in budget
    ):
        assert placements[0].budget.resolve(size) == 6000
        return
    # the video decides what each layer leaves, so placements say the most; that plans meet the mean
    # is test_the_mean_over_layers_is_met_whatever_the_video
    if name == "framefusion":
        assert all(p.adaptive for p in placements)
        assert [p.budget.resolve(size) for p in placements] == [size] * 19 + [6000]
        return
    for passed in ("earlier", "last"):  # a prompt's last image, then the others
        counts = [size] * depth
        for p in placements:
            if p.images != passed:
                end = p.until or depth
                counts[p.layer : end] = [p.budget.resolve(size)] * (end - p.layer)
        assert sum(counts) / depth / size == pytest.approx(0.6, abs=2e-4)


@pytest.mark.parametrize("name", BUDGETED)
def test_num_tokens_is_what_the_last_placement_leaves(name):
    assert get_method(name)(num_tokens=9).placements(32)[-1].budget.resolve(576) == 9


@pytest.mark.refusal
@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in BUDGETED])
def test_a_method_without_a_budget_refuses_one(name):
    for bad in ({"keep_ratio": 0.5}, {"num_tokens": 4}, {"mean_keep_ratio": 0.5}):
        with pytest.raises(BudgetError, match=f"{name} takes no {next(iter(bad))}"):
            get_method(name)(**bad)


@pytest.mark.refusal
@pytest.mark.parametrize("name", BUDGETED)
def test_bad_budgets_are_refused(name):
    cls = get_method(name)
    with pytest.raises(BudgetError, match="one budget"):
        cls(keep_ratio=0.5, num_tokens=8)
    for bad in ({"keep_ratio": 0.0}, {"keep_ratio": 1.5}, {"num_tokens": 0}, {"num_tokens": 2.0}):
        with pytest.raises(BudgetError, match=next(iter(bad))):
            cls(**bad)
    with pytest.raises(BudgetError, match="mean_keep_ratio"):
        cls(mean_keep_ratio=-0.1)


@pytest.mark.refusal
@pytest.mark.parametrize("name", METHODS)
def test_hyper_parameters_of_a_wrong_type_are_refused_by_name(name):
    cls = get_method(name)
    own = {f.name for f in dataclasses.fields(cls)} - {
        f.name for f in dataclasses.fields(Compressor)
    }
    for field in own:
        with pytest.raises((ConfigError, BudgetError), match=field):
            cls(**{field: object()})


# --- the file


@pytest.mark.parametrize("name", METHODS)
def test_objects_are_values(name):
    cls = get_method(name)
    for method in variants(name):
        copy = pickle.loads(pickle.dumps(method))
        assert copy == method
        assert hash(copy) == hash(method)
        assert cls(**method.hyperparameters()) == method
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.keep_ratio = 0.5
    with pytest.raises(TypeError):
        cls(0.5)
    assert cls.__final__


@pytest.mark.parametrize("name", METHODS)
def test_documentation_says_what_is_followed(name):
    cls = get_method(name)
    path = Path(__import__(cls.__module__, fromlist=["_"]).__file__)
    text = path.read_text()
    assert path.stem.rstrip("_") == name
    assert len(text.splitlines()) <= 300
    assert all(word and "\n" not in word for word in (cls.summary, cls.paper, cls.evidence))
    assert cls.__doc__
    module_doc = text.split('"""')[1]
    if cls.evidence in ("control", "composition", "own"):
        assert cls.paper == cls.evidence
        assert cls.evidence.capitalize() in module_doc
    else:
        # a paper whose number is not known is cited by its official code
        assert "arXiv:" in cls.paper or "github.com/" in cls.paper
        for part in (cls.paper.rsplit(" ", 1)[-1], "Source:", "Follows", "Differs:"):
            assert part in module_doc
    for field in {f.name for f in dataclasses.fields(cls)} - {
        f.name for f in dataclasses.fields(Compressor)
    }:
        assert f"{field}:" in cls.__doc__


@pytest.mark.parametrize("name", METHODS)
def test_published_setting_is_configured(name):
    path = CONFIGS / f"{name}.yaml"
    assert path.read_text().startswith("#")
    method = load_config(path)
    assert method.name == name
    assert method.placements(32)


def test_every_config_belongs_to_a_method():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(BUILT_IN)
