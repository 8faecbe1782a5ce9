"""A checkpoint of random weights, and plans small enough to run in seconds."""

import pytest

from vispress.bench.model.loaded_model import load_named_model
from vispress.bench.plan.plan import plan_from_mapping


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    from vispress.reference.model.checkpoint import export
    from vispress.reference.model.llava import build_model, reference_config

    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    export(build_model(reference_config(vision_layers=2, text_layers=4), seed=0), folder)
    return folder


@pytest.fixture(scope="session")
def subject(checkpoint):
    return load_named_model(str(checkpoint))


@pytest.fixture
def make_plan(checkpoint):
    def make(**changes):
        small = {
            "model": str(checkpoint),
            "tasks": ["attribute", "count"],
            "methods": ["fastv", {"method": "random", "seeds": [0, 1]}, "no_image"],
            "keep_ratios": [0.5],
            "questions": 4,
            "max_new_tokens": 2,
            "timing": {"batch": 0},
            "controls": "none",
        }
        return plan_from_mapping(small | changes)

    return make
