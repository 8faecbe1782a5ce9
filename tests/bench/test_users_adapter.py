"""A user's own adapter gets the oracle and the down-sampling control from two methods."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import LlavaModel

from vispress import compressed, register_adapter
from vispress.adapters import registry
from vispress.adapters.base import list_families
from vispress.adapters.llava import LlavaAdapter
from vispress.adapters.towers import TowerAdapter
from vispress.bench.plan.cells import Cell
from vispress.bench.plan.downsample import Downsample, any_size, smaller
from vispress.bench.plan.oracle import Oracle, choose_tokens, with_evidence
from vispress.bench.run.applied_cell import apply_cell, check_cell
from vispress.bench.tasks.task import get_task
from vispress.errors import BudgetError, UnsupportedMethodError


class FarModel(LlavaModel):
    """A base model that no built-in adapter serves by its own name."""


class PlainAdapter(TowerAdapter):
    """What every family must say, and nothing of grids over whole pictures."""

    family = "far"

    def sequences(self, modality, call, length):
        return [[length]] * len(call["pixel_values"])

    def pack(self, modality, values, call):
        return tuple(values.unbind(0))

    def layouts(self, modality, counts, call):
        return [((1, 12, 12), None)] * len(counts)


class GridAdapter(PlainAdapter):
    """It says where tokens lie, but makes no picture smaller."""

    def picture_grids(self, modality, inputs):
        pixels = inputs.get("pixel_values", ())
        return [(1, pixels.shape[2] // 8, pixels.shape[3] // 8) for _ in pixels]


class WholeAdapter(GridAdapter):
    """It makes pictures smaller, too, in its own way."""

    any_size = LlavaAdapter.any_size

    def resize(self, modality, inputs, grids, encode):
        rows, columns = grids[0][1:]
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        visual = ids == self.placeholders()["image"]
        # these prompts have one picture each, and equal texts
        stays = ~visual | (visual.cumsum(1) <= rows * columns)
        pixels = inputs["pixel_values"][:, :, : 8 * rows, : 8 * columns]
        return {
            "input_ids": ids[stays].view(len(ids), -1),
            "attention_mask": mask[stays].view(len(ids), -1),
            "pixel_values": pixels,
        }


class LazyAdapter(WholeAdapter):
    """It claims to make pictures smaller."""

    def resize(self, modality, inputs, grids, encode):
        return inputs


@pytest.fixture
def far(subject, monkeypatch):
    """The reference model under another class name, served by the adapter that is asked for."""
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))

    def served_by(adapter):
        registry._ADAPTERS.pop("FarModel", None)
        register_adapter("FarModel")(adapter)
        model = copy.deepcopy(subject.model)
        model.model.__class__ = FarModel
        return replace(subject, model=model)

    return served_by


@pytest.fixture(scope="module")
def prompts():
    return get_task("relation").draw(4, 0)


def test_the_oracle_is_told_where_the_evidence_is(far, prompts):
    loaded = far(GridAdapter)
    inputs = loaded.encode(prompts)
    method = with_evidence(Oracle(num_tokens=40), loaded.model, inputs, prompts)
    with compressed(loaded.model, method) as view, torch.no_grad():
        loaded.model(**inputs)
        images = [image for sample in view.report.samples for image in sample.images]
    for image, prompt in zip(images, prompts, strict=True):
        assert image.kept == tuple(choose_tokens(prompt.evidence[0], (1, 12, 12), 40).tolist())


def test_pictures_are_made_smaller_by_the_adapter(far, prompts):
    loaded = far(WholeAdapter)
    equal = [replace(prompts[0], answer=str(i)) for i in range(2)]
    cell = Cell(group="downsample", picture=Downsample(num_tokens=30))
    check_cell(cell, loaded, None, pictures=["relation"])
    inputs = loaded.encode(equal)
    hooks = len(loaded.model.model.vision_tower._forward_pre_hooks)
    with apply_cell(cell, loaded, equal, inputs) as now:
        assert now.tokens == (288, 60)
        assert now.inputs["pixel_values"].shape == (2, 3, 40, 48)
        assert len(loaded.converse(equal, now.inputs, 2)) == 2
    assert len(loaded.model.model.vision_tower._forward_pre_hooks) == hooks


def test_what_an_adapter_does_not_say_is_refused_by_name(far, prompts):
    plain = far(PlainAdapter)
    inputs = plain.encode(prompts)
    words = "one grid of visual tokens over the whole picture, which far does not have; it works on"
    with pytest.raises(UnsupportedMethodError, match=f"oracle needs {words} .*llava, .*qwen2_5_vl"):
        with_evidence(Oracle(num_tokens=4), plain.model, inputs, prompts)
    with pytest.raises(UnsupportedMethodError, match=f"downsample needs {words}"):
        smaller(Downsample(num_tokens=4), plain, inputs, prompts)
    grids = far(GridAdapter)
    assert "far" in list_families(gives="picture_grids")
    assert "far" not in list_families(gives="resize")
    words = "the adapter of far cannot resize pictures"
    with pytest.raises(UnsupportedMethodError, match=words), any_size(grids.model):
        pass
    with pytest.raises(UnsupportedMethodError, match=words):
        smaller(Downsample(num_tokens=4), grids, inputs, prompts)
    cell = Cell(group="downsample", picture=Downsample(num_tokens=30))
    with pytest.raises(UnsupportedMethodError, match=words):
        check_cell(cell, grids, None, pictures=["relation"])


def test_pictures_that_stay_large_are_an_error(far, prompts):
    loaded = far(LazyAdapter)
    with pytest.raises(BudgetError, match="off target: 576 visual tokens"):
        smaller(Downsample(num_tokens=4), loaded, loaded.encode(prompts), prompts)
