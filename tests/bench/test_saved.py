"""Saved compressors in plans: their parameters are applied, and are part of what a cell is."""

import json
import shutil

import pytest
import torch

from vispress import (
    compress_model,
    compression_report,
    remove_compression,
    save_compression,
)
from vispress.adapters.base import find_adapter
from vispress.api import attachment_of
from vispress.bench.plan.cells import cells_of
from vispress.bench.plan.saved import SHIPPED
from vispress.bench.results.files import ResultsError
from vispress.bench.results.merge_runs import merge_runs
from vispress.bench.results.store import read_results
from vispress.bench.run.applied_cell import apply_cell, check_cell
from vispress.bench.run.engine import run
from vispress.bench.tasks.task import get_task
from vispress.bench.timing.cost import measure_cost
from vispress.errors import ConfigError
from vispress.methods import DivPrune, RelevanceDPP
from vispress.reference import compressor
from vispress.runtime.modules import held

SMALL = RelevanceDPP(keep_ratio=0.25, width=8, heads=2, blocks=1, weight=50.0, spread=1.0)


def save(model, folder, *, seed=0, method=SMALL, **options):
    """A folder of drawn parameters."""
    compress_model(model, method, **options)
    module = held(find_adapter(model).base)
    if module is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_compression(model, folder)
    remove_compression(model)
    return str(folder)


@pytest.fixture(scope="module")
def folder(subject, tmp_path_factory):
    return save(subject.model, tmp_path_factory.mktemp("saved") / "first")


@pytest.fixture(scope="module")
def other(subject, tmp_path_factory):
    return save(subject.model, tmp_path_factory.mktemp("saved") / "other", seed=1)


def cells(entry, ratios=(0.1,)):
    return cells_of(entry, ratios, "placement")


def test_an_entry_is_the_folders_method_at_the_plans_budget(folder):
    (cell,) = cells({"compressor": folder, "label": "ours"})
    assert cell.key == "ours--0.1"
    (method,) = cell.chain
    assert (method.keep_ratio, method.width, method.weight) == (0.1, 8, 50.0)
    (own,) = cells({"compressor": folder, "keep_ratios": []})
    assert (own.key, own.chain) == ("relevance_dpp", (SMALL,))
    (changed,) = cells({"compressor": folder, "num_tokens": 9, "weight": 0.0})
    assert (changed.chain[0].num_tokens, changed.chain[0].weight) == (9, 0.0)
    assert changed.chain[0].keep_ratio is None


def test_parameters_are_part_of_a_cell(folder, other, tmp_path):
    one, two = (cells({"compressor": name})[0].to_dict() for name in (folder, other))
    assert one["methods"] == two["methods"]
    assert one["compressor"]["sha256"] != two["compressor"]["sha256"]
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert cells({"compressor": str(moved)})[0].to_dict() == one
    assert "compressor" not in cells("divprune")[0].to_dict()


def kept(model):
    return [[image.kept for image in s.images] for s in compression_report(model).samples]


def test_a_cell_keeps_what_the_folder_keeps(subject, folder, other):
    prompts = get_task("attribute").draw(2, 0)
    inputs = subject.encode(prompts)
    found = {}
    for name in (folder, other):
        (cell,) = cells({"compressor": name, "keep_ratios": []})
        with apply_cell(cell, subject, prompts, inputs) as now:
            subject.converse(prompts, now.inputs, 1)
            found[name] = kept(subject.model)
        compress_model(subject.model, config=name)
        subject.converse(prompts, inputs, 1)
        assert kept(subject.model) == found[name]
        remove_compression(subject.model)
    assert found[folder] != found[other]


def test_positions_that_were_saved_are_those_of_the_cell(subject, folder, tmp_path):
    compact = save(subject.model, tmp_path / "compact", positions="compact")
    assert cells({"compressor": compact})[0].to_dict()["compressor"]["positions"] == "compact"
    prompts = get_task("attribute").draw(1, 0)
    inputs = subject.encode(prompts)
    for name, positions, expected in (
        (folder, None, None),
        (compact, None, "compact"),
        (compact, "original", "original"),
    ):
        (cell,) = cells({"compressor": name})
        with apply_cell(cell, subject, prompts, inputs, positions) as now:
            subject.converse(prompts, now.inputs, 1)
            assert attachment_of(subject.model).request.positions == expected


def test_costs_are_those_of_the_parameters(subject, folder, make_plan, monkeypatch):
    prompts = get_task("attribute").draw(1, 0)
    plan = make_plan(timing={"batch": 1, "rounds": 2, "repeats": 1, "decode_tokens": 0})
    (cell,) = cells({"compressor": folder})
    loads = []
    monkeypatch.setattr(type(cell.saved), "load", lambda self, model: loads.append(self))
    measure_cost(subject, cell.chain, prompts, plan, saved=cell.saved)
    # recorded, then compressed and replayed in two rounds, and the peak
    assert loads == [cell.saved] * 6


def test_results_are_stored_and_never_joined_with_those_of_other_parameters(
    folder, other, make_plan, tmp_path
):
    for number, name in enumerate((folder, other)):
        entry = {"compressor": name, "label": "ours"}
        run(make_plan(methods=[entry], questions=2, tasks=["attribute"]), tmp_path / str(number))
    manifest, found = read_results(tmp_path / "0")
    stored = json.loads((tmp_path / "0" / "cells" / "ours--0.5.json").read_text())["cell"]
    assert stored["compressor"]["sha256"] == manifest["plan"]["cells"][1]["compressor"]["sha256"]
    assert len(found) == 2
    with pytest.raises(ResultsError, match=r"'ours--0\.5' .* differs in its hyper-parameters"):
        merge_runs([tmp_path / "0", tmp_path / "1"], tmp_path / "both")


@pytest.mark.parametrize("model", SHIPPED)
def test_shipped_ones_go_by_the_name_of_their_model(model):
    (cell,) = cells({"compressor": model})
    card = json.loads((compressor(architecture=SHIPPED[model]) / "vispress.json").read_text())
    assert cell.to_dict()["compressor"]["sha256"] == card["sha256"]
    assert card["data"]["model"] == model


def test_entries_that_cannot_be_are_named(subject, folder, tmp_path):
    with pytest.raises(ConfigError, match=r"no folder 'referense', .* did you mean 'reference'"):
        cells({"compressor": "referense"})
    assert cells({"compressor": folder, "method": "relevance_dpp"})[0].saved is not None
    with pytest.raises(ConfigError, match="first holds relevance_dpp"):
        cells({"compressor": folder, "method": "divprune"})
    with pytest.raises(ConfigError, match=r"cannot read .*vispress\.json"):
        cells({"compressor": str(tmp_path)})
    plain = save(subject.model, tmp_path / "plain", method=DivPrune(keep_ratio=0.5))
    with pytest.raises(ConfigError, match="holds no parameters"):
        cells({"compressor": plain})
    chain = save(subject.model, tmp_path / "chain", method=[DivPrune(keep_ratio=0.5), SMALL])
    with pytest.raises(ConfigError, match="holds a chain"):
        cells({"compressor": chain})


def test_parameters_of_another_model_are_refused_before_any_cell_runs(subject, folder, tmp_path):
    card = tmp_path / "qwen" / "vispress.json"
    shutil.copytree(folder, card.parent)
    card.write_text(json.dumps(json.loads(card.read_text()) | {"family": "qwen2_5_vl"}))
    for entry, says in (
        ({"compressor": str(card.parent)}, "saved of a qwen2_5_vl model"),
        ({"compressor": folder, "width": 16}, "it is of a model of another width"),
        ({"compressor": folder, "blocks": 2}, "lacks"),
    ):
        (cell,) = cells(entry)
        with pytest.raises(ConfigError, match=says):
            check_cell(cell, subject, None, pictures=["attribute"])
