"""What the vLLM plug-in keeps count of and refuses, ahead of any engine: no vLLM is needed."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests.tiny_models import build
from vispress.adapters.base import find_adapter
from vispress.errors import ConfigError, UnsupportedMethodError, VispressError
from vispress.integrations.vllm import releases
from vispress.integrations.vllm.engine import check_engine, check_places
from vispress.integrations.vllm.places import (
    RIDING,
    data_of,
    inside,
    laid_out,
    read,
    tokens_alone,
    written,
)
from vispress.integrations.vllm.refusal import refusing
from vispress.integrations.vllm.spec import read_spec, servable
from vispress.registry import list_methods


@pytest.fixture(scope="module")
def config():
    return build("llava", layers=4).config


def asked(config, /, **given):
    own = copy.deepcopy(config)
    own.vispress = given
    return own


def test_nothing_is_asked_without_the_key(config):
    assert read_spec(config) is None


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({"method": "divprune", "keep_ratio": 0.25}, 9),
        ({"method": "cdpruner", "num_tokens": 5}, 5),
        ({"method": "random", "num_tokens": 99}, 36),
        ({"method": "avg_pool", "keep_ratio": 0.2}, 6),  # the nearest to 7.2 that a raster has
    ],
)
def test_count_is_known_ahead(config, given, count):
    spec = read_spec(asked(config, **given))
    assert spec.count("image", 36, ((1, 6, 6), None)) == count


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"method": "fastv", "keep_ratio": 0.5}, UnsupportedMethodError, "acts at in_llm"),
        ({"method": "scm", "keep_ratio": 0.5}, UnsupportedMethodError, "reads mean_attention"),
        ({"method": "prumerge"}, UnsupportedMethodError, "give keep_ratio or num_tokens"),
        ({"method": "quadtree_merge", "keep_ratio": 0.5}, UnsupportedMethodError, "cells are left"),
        ({"method": "prumerge", "keep_ratio": 0.5}, UnsupportedMethodError, "behind layer 2"),
        ({"method": "no_image"}, UnsupportedMethodError, "keeps no token"),
        ({"method": "relevance_dpp", "keep_ratio": 0.5}, UnsupportedMethodError, "config=FOLDER"),
        (
            {"method": "random", "keep_ratio": 0.5, "positions": "original"},
            UnsupportedMethodError,
            '"positions": "compact"',
        ),
        (
            {"chain": [{"method": "divprune", "keep_ratio": 0.5}, {"method": "vtw"}]},
            UnsupportedMethodError,
            r"a chain \(divprune, vtw\)",
        ),
        ({"method": "evs", "keep_ratio": 0.5}, UnsupportedMethodError, "reads no videos"),
        ({"config": "nowhere.yaml"}, ConfigError, "nowhere.yaml"),
        ({"config": "x.yaml", "method": "random"}, ConfigError, "give one of them"),
        ({}, ConfigError, "must be a mapping such as"),
    ],
)
def test_refused_at_start_up(config, given, error, words):
    with pytest.raises(error, match=words):
        read_spec(asked(config, **given))


def test_a_refusal_names_what_works(config):
    with pytest.raises(UnsupportedMethodError, match=r"serve on llava: .*divprune.*visionzip"):
        read_spec(asked(config, method="fastv", keep_ratio=0.5))


@pytest.mark.slow
def test_every_method_is_served_or_refused_by_name(config):
    spec = read_spec(asked(config, method="divprune", keep_ratio=0.25))
    works = servable(spec.adapter)
    trained = {"hicom", "relevance_dpp", "vision_selector"}
    for name in list_methods():
        if name in works:
            continue
        with pytest.raises(VispressError):
            read_spec(asked(config, method=name, keep_ratio=0.25))
    for name in set(works) - trained:
        read_spec(asked(config, method=name, keep_ratio=0.25, positions="compact"))


def test_other_compressors_have_other_names(config):
    salts = [
        read_spec(asked(config, method="random", **more)).salt
        for more in ({"num_tokens": 5}, {"num_tokens": 6}, {"num_tokens": 5, "seed": 1})
    ]
    assert len({*salts}) == 3
    assert read_spec(asked(config, method="random", num_tokens=5)).salt == salts[0]


@pytest.mark.parametrize(("release", "fits"), [("0.32.4", True), ("0.33.0", False), ("1.0", False)])
def test_releases(release, fits):
    assert releases.supported(release) is fits
    if not fits:
        assert release in str(releases.refusal(release))


def test_another_release_refuses_only_what_asks():
    class Theirs:
        def __init__(self, *, vllm_config, prefix=""):
            self.config = vllm_config

    class Config:
        def __init__(self, **own):
            self.hf_config = self.model_config = self
            self.__dict__.update(own)

    ours = refusing(Theirs)
    assert isinstance(ours(vllm_config=Config()), Theirs)
    with pytest.raises(VispressError, match="no release that vispress can compress on"):
        ours(vllm_config=Config(vispress={"method": "random"}))


def engine_config(**changed):
    """vLLM's configuration as far as it is looked at, in its usual state."""
    usual = {
        "model_config.multimodal_config.enable_mm_embeds": False,
        "model_config.multimodal_config.get_limit_per_prompt": lambda modality: 1,
        "model_config.multimodal_config.video_pruning_rate": None,
        "model_config.hf_config.vision_config.rope_parameters": None,
        "parallel_config.tensor_parallel_size": 1,
        "parallel_config.pipeline_parallel_size": 1,
        "compilation_config.cudagraph_mm_encoder": False,
        "lora_config.enable_tower_connector_lora": False,
        "compilation_config.compile_mm_encoder": False,
        "compilation_config.cudagraph_mode": None,
        "speculative_config": None,
    }
    names = {path.rpartition(".")[2]: path for path in usual}
    root = SimpleNamespace()
    for path, value in (usual | {names[name]: value for name, value in changed.items()}).items():
        *owners, leaf = path.split(".")
        at = root
        for owner in owners:
            if not hasattr(at, owner):
                setattr(at, owner, SimpleNamespace())
            at = getattr(at, owner)
        setattr(at, leaf, value)
    return root


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"tensor_parallel_size": 2}, "reads cls_attention"),
        ({"enable_mm_embeds": True}, "no encoder of the engine has seen"),
        ({"video_pruning_rate": 0.5}, "'evs'"),
        ({"enable_tower_connector_lora": True}, "of the LLM work"),
        ({"cudagraph_mm_encoder": True}, "set it to False"),
        ({"compile_mm_encoder": True}, "set it to False"),
    ],
)
def test_settings_of_an_engine_that_are_refused(config, setting, words):
    spec = read_spec(asked(config, method="fastervlm", keep_ratio=0.5))
    check_engine(spec, engine_config())
    with pytest.raises(ConfigError, match=words):
        check_engine(spec, engine_config(**setting))


def test_videos_that_are_not_served_must_be_left_out():
    spec = read_spec(asked(build("qwen3_vl", layers=4).config, method="cdpruner", keep_ratio=0.5))
    with pytest.raises(UnsupportedMethodError, match=r'limit_mm_per_prompt={"video": 0}'):
        check_engine(spec, engine_config())
    check_engine(spec, engine_config(get_limit_per_prompt=lambda modality: modality != "video"))


FULL = SimpleNamespace(mixed_mode=lambda: SimpleNamespace(name="FULL"))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"rope_parameters": {"rope_theta": 100.0}}, "rotary base 100"),
        ({"pipeline_parallel_size": 2}, "set pipeline_parallel_size=1"),
        ({"cudagraph_mode": FULL}, "FULL_AND_PIECEWISE"),
        ({"speculative_config": object()}, "leave speculative_config out"),
    ],
)
def test_settings_that_would_move_positions_are_refused(setting, words):
    check_places(engine_config(rope_parameters={"rope_theta": 10000}))
    with pytest.raises(VispressError, match=words):
        check_places(engine_config(**setting))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_places_ride_in_any_type(dtype):
    found = torch.tensor([[0, 127, 128, 2_000_000], [1, 255, 256, 70_000], [5, 6, 7, 16_384]])
    digits = written(found, torch.zeros(1, dtype=dtype))
    assert digits.shape == (4, RIDING)
    assert read(digits).tolist() == found.tolist()


def test_short_prompts_are_laid_out_as_whole_ones():
    model = build("qwen2_5_vl", layers=2)
    adapter, token = find_adapter(model), model.config.image_token_id
    grids = [torch.tensor([1, 12, 4]), torch.tensor([1, 4, 6])]  # 6 x 2 and 2 x 3 tokens

    def rule(ids, features):
        thw = torch.stack([one.data["image_grid_thw"].data for one in features])
        kinds = (torch.tensor([ids]) == token).int()
        places, delta = model.model.get_rope_index(
            torch.tensor([ids]), mm_token_type_ids=kinds, image_grid_thw=thw
        )
        return places[:, 0], int(delta)

    def feature(offset, length, grid):
        data = {"image_grid_thw": SimpleNamespace(data=grid)}
        place = SimpleNamespace(offset=offset, length=length)
        return SimpleNamespace(modality="image", data=data, mm_position=place)

    whole = [5, 6, *[token] * 12, 7, *[token] * 6, 8, 9]
    short = [5, 6, *[token] * 3, 7, *[token] * 2, 8, 9]
    kept = [torch.tensor([0, 7, 11]), torch.tensor([2, 3])]
    full, delta = rule(whole, [feature(2, 12, grids[0]), feature(15, 6, grids[1])])
    # features come in any order
    features = [feature(6, 2, grids[1]), feature(2, 3, grids[0])]
    run = partial(tokens_alone, adapter)
    found, short_delta = laid_out(rule, run, short, features)
    call = {"image_grid_thw": torch.stack(grids)}
    for number, at in enumerate((slice(2, 5), slice(6, 8))):
        data = data_of("image", call, number)
        found[:, at] += inside(rule, run, "image", data)[:, kept[number]]
    stay = [0, 1, *(2 + kept[0]).tolist(), 14, *(15 + kept[1]).tolist(), 21, 22]
    assert found.tolist() == full[:, stay].tolist()
    assert short_delta + len(short) == delta + len(whole)
