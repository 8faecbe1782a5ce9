"""At 4,096 patches no method holds a map of the vision encoder's attention, whole."""

from typing import Any

import pytest
import torch
from tests.laws.cases import METHODS, fits, make
from tests.tiny import Image, Sample, Text, build, make_inputs
from tests.tiny_models import IMAGE_ID
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vispress import compressed
from vispress.bench.timing.memory import LiveBytes
from vispress.registry import get_method
from vispress.types import ATTENTION_SIGNALS

pytestmark = pytest.mark.full

PATCHES = 4096
READERS = [name for name in METHODS if get_method(name).reads & ATTENTION_SIGNALS]
SCORES = {
    "llava": ("cls", "column_mean"),
    "qwen2_5_vl": ("column_mean",),
    "qwen3_vl": ("column_mean",),
}
CASES = [
    (family, method, scores)
    for family, known in SCORES.items()
    for method in READERS
    if fits(family, method)
    for scores in (known if "scores" in make(family, method).hyperparameters() else (None,))
]


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        sizes = [x.untyped_storage().nbytes() // x.itemsize for x in made]
        self.numel = max([self.numel, *sizes])
        return out


def large(family: str) -> tuple[Any, dict[str, Any]]:
    """A model and a prompt with one image of `PATCHES` patches."""
    if family != "llava":
        sample = Sample([Text(5), Image(32, 32), Text(7)])  # of 2 x 2 patches each
        return build(family, dtype=torch.float32), make_inputs(
            family, [sample], dtype=torch.float32
        )
    model = build(family, dtype=torch.float32, vision={"image_size": 256})
    ids = torch.tensor([[*range(3, 8), *[IMAGE_ID] * PATCHES, *range(8, 15)]])
    pixels = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
    }


def measured(model: Any, inputs: dict[str, Any]) -> tuple[int, int]:
    """Elements of the largest tensor of a forward, and the most bytes alive at once."""
    with torch.no_grad(), Largest() as largest, LiveBytes() as live:
        model(**inputs, logits_to_keep=1)
    return largest.numel, live.peak


@pytest.mark.parametrize(("family", "method", "scores"), CASES)
def test_no_map_of_an_encoder_layer_is_ever_whole(
    family: str, method: str, scores: str | None
) -> None:
    model, inputs = large(family)
    measured(model, inputs)  # lasting buffers of transformers
    plain_numel, plain_peak = measured(model, inputs)
    with compressed(model, make(family, method, **({"scores": scores} if scores else {}))):
        numel, peak = measured(model, inputs)
    whole = PATCHES * PATCHES
    assert plain_numel < whole  # what the model makes by itself does not hide it
    assert numel < whole
    assert peak < plain_peak + 4 * whole  # one head's, fp32
