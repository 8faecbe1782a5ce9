"""Models and settings that adapters refuse, and how."""

from typing import Any

import pytest
from tests.tiny import build
from torch import nn

from vispress.adapters.base import ModelAdapter, find_adapter, register_adapter
from vispress.errors import ConfigError, UnsupportedModelError


def test_an_unknown_model_is_refused_with_the_families() -> None:
    with pytest.raises(UnsupportedModelError, match=r"internvl, llava, llava_next.*qwen3_vl"):
        find_adapter(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="torch module"):
        find_adapter("llava")  # type: ignore[arg-type]


def test_an_adapter_cannot_take_a_served_name() -> None:
    class Other(ModelAdapter):
        """Not the LLaVA adapter."""

    with pytest.raises(ConfigError, match="already served by adapter LlavaAdapter"):
        register_adapter("LlavaModel")(Other)
    with pytest.raises(ConfigError, match="at least one"):
        register_adapter()


@pytest.mark.parametrize(
    ("family", "setting", "value", "message"),
    [
        ("llava", "vision_feature_layer", [-2, -1], "mixes encoder layers"),
        ("llava", "vision_feature_layer", 0, "valid are -4 to -1 and 1 to 4"),
        ("llava_next", "vision_feature_layer", -5, "valid are -4 to -1 and 1 to 4"),
        ("llava", "vision_feature_select_strategy", "full", "with \\[CLS\\] needs 'default'"),
        ("llava_onevision", "vision_feature_select_strategy", "default", "needs 'full'"),
        ("internvl", "vision_feature_select_strategy", "full", "needs 'default'"),
    ],
)
def test_settings_that_would_go_wrong_are_refused(
    family: str, setting: str, value: Any, message: str
) -> None:
    model = build(family, layers=1)
    setattr(model.model.config, setting, value)
    with pytest.raises(UnsupportedModelError, match=message):
        find_adapter(model)


def test_towers_and_encoders_without_what_is_needed_are_refused() -> None:
    model = build("llava", layers=1)
    model.model.vision_tower = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match="Linear: CLIP and SigLIP towers"):
        find_adapter(model)
    qwen = build("qwen2_5_vl", layers=1)
    qwen.model.visual.fullatt_block_indexes = []
    with pytest.raises(UnsupportedModelError, match="no full-attention block"):
        find_adapter(qwen)
