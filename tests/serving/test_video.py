"""Videos, alone and beside pictures."""

import numpy as np
import pytest

from tests.serving import families
from tests.serving.harness import Prompt, check, engine, on_transformers
from tests.serving.test_families import picture


def clip(number: int, frames: int, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    draw = np.random.default_rng(100 + number)
    noise = draw.integers(0, 255, (frames, height // 8, width // 8, 3), dtype=np.uint8)
    return noise.repeat(8, axis=1).repeat(8, axis=2)


def prompts(family: str) -> list[Prompt]:
    image, video = families.MARK[family], families.VIDEO_MARK[family]
    return [
        Prompt(f"{video}what moves?", (), (clip(0, 4, (40, 40)),)),
        Prompt(f"{video}what moves?", (), (clip(1, 8, (32, 56)),)),
        Prompt(f"is {image} in {video}?", (picture(50),), (clip(2, 4, (48, 32)),)),
        Prompt(f"{video} or {image}?", (picture(51),), (clip(3, 6, (40, 40)),)),
        Prompt(f"{image}?", (picture(52),)),
    ]


CASES = [
    *((family, method) for family in families.VIDEO_MARK for method in ("divprune", "evs")),
    ("qwen3_vl", "ensemble"),
    ("internvl", "visionzip"),
]
CASES.remove(("internvl", "evs"))  # to InternVL frames are tiles: there are no videos


@pytest.mark.parametrize(("family", "method"), CASES)
def test_as_on_transformers(family, method, tmp_path_factory):
    folder = tmp_path_factory.mktemp(family)
    model, processor = families.save(family, folder)
    asked = {"method": method, "keep_ratio": 0.4}
    if family == "llava_onevision":
        asked["positions"] = "compact"
    expected = on_transformers(model, processor, prompts(family), asked)
    limits = {"image": 1, "video": 1}
    with engine(folder, processor, asked, limit_mm_per_prompt=limits) as made:
        check(made, prompts(family), expected)


@pytest.mark.parametrize("settings", [{"max_num_batched_tokens": 64}, {}], ids=["cut", "cached"])
def test_frames_among_text(settings, tmp_path):
    """Chunks cut runs of frames and text, in a batch; repeats are found in the prefix cache."""
    model, processor = families.save("qwen3_vl", tmp_path)
    asked = {"method": "divprune", "keep_ratio": 0.4}
    shown = prompts("qwen3_vl")
    expected = on_transformers(model, processor, shown, asked)
    limits = {"limit_mm_per_prompt": {"image": 1, "video": 1}, "max_num_seqs": 8}
    with engine(tmp_path, processor, asked, **limits | settings) as made:
        check(made, shown, expected)
        again = made.ask(shown)
        assert [one.ids for one in again] == [one.ids for one in expected]
        assert any(one.cached for one in again)
