"""Every other family that is served, with methods that read each kind of signal."""

import numpy as np
import pytest
from PIL import Image

from tests.serving import families
from tests.serving.harness import Engine, Prompt, check, engine, on_transformers

FOUR = "features; attention (and keys, merged, where there is [CLS]); the text; the projector"
SERVED = {
    "llava_next": ("divprune", "visionzip", "cdpruner", "zoo_prune"),
    "llava_onevision": ("divprune", "ensemble", "cdpruner", "zoo_prune"),
    "qwen2_vl": ("divprune", "ensemble", "cdpruner", "zoo_prune"),
    "qwen2_5_vl": ("divprune", "ensemble", "cdpruner", "zoo_prune"),
    "qwen3_vl": ("divprune", "ensemble", "cdpruner", "zoo_prune"),
    "internvl": ("divprune", "visionzip", "cdpruner", "zoo_prune"),
}
SIZES = ((40, 40), (24, 64), (72, 32), (48, 40), (40, 24))


def picture(number: int, size=None) -> Image.Image:
    height, width = size or SIZES[number % len(SIZES)]
    draw = np.random.default_rng(number)
    noise = draw.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


def prompts(family: str, processor) -> list[Prompt]:
    """One picture, two, five of all sizes, text behind them and alone; no picture twice."""
    mark = families.MARK[family]
    pictures = [picture(number) for number in range(11)]
    return [
        *(Prompt(f"{mark}what is {number}?", (pictures[number],)) for number in range(4)),
        Prompt(f"a {mark} and {mark} differ?", tuple(pictures[4:6])),
        Prompt(f"{mark} {mark}is {mark}{mark} or {mark} red?", tuple(pictures[6:11])),
        Prompt("no picture at all"),
    ]


@pytest.fixture(scope="module", params=SERVED)
def served(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return (request.param, folder, *families.save(request.param, folder))


@pytest.mark.parametrize("number", range(4), ids=["features", "attention", "text", "projector"])
def test_as_on_transformers(served, number):
    family, folder, model, processor = served
    asked = {"method": SERVED[family][number], "keep_ratio": 0.4}
    shown = prompts(family, processor)
    expected = on_transformers(model, processor, shown, asked)
    limits = {"image": 5, "video": 0}
    with engine(folder, processor, asked, limit_mm_per_prompt=limits) as made:
        check(made, shown, expected)


def test_videos_that_are_not_served_are_refused_at_start_up(tmp_path):
    _, processor = families.save("qwen3_vl", tmp_path)
    asked = {"method": "cdpruner", "keep_ratio": 0.4}
    limits = {"image": 1, "video": 1}
    with pytest.raises(Exception, match="frames of videos of qwen3_vl bring text"):
        Engine(tmp_path, processor, asked, limit_mm_per_prompt=limits)
