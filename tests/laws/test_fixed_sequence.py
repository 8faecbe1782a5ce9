"""A prefill of a layout that was seen, and a step behind it, are fixed sequences of operations.

That is what a CUDA graph can hold: the same operations whatever the picture and the text, and
nothing of them, nor of weights, that the host reads. Methods that are none say why
(`Compressor.uncapturable`), and this law sees to it that they are none.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests.laws.cases import (
    GISTS,
    SAMPLES,
    VIDEO_CASES,
    VIDEO_SAMPLES,
    cases,
    make,
    make_inputs,
    model_of,
)
from tests.tiny import GIST, Image, Sample, Text, build, gist_tokens
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from vispress import compressed
from vispress.adapters.base import find_adapter
from vispress.config import make_compressor
from vispress.errors import UnsupportedModelError
from vispress.methods.base import Compressor
from vispress.runtime.forward.model_call import knowing
from vispress.runtime.graphs.arguments import Arguments, special_ids
from vispress.runtime.graphs.watch import NotFixedError, Watch
from vispress.runtime.kv_cache.hf_compat import CACHE

ONE = (Sample([Text(5), Image(4, 4), Text(7)]),)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("prumerge", {}),
    ("gamma_mod", {"threshold": 0.5}),
    ("debias", {"keep_ratio": 0.4, "shrink": True}),
    ("per_image", {"inner": "prumerge"}),
]
"""Settings beside those of the table that may not be captured."""


def pair(family: str, samples: tuple[Sample, ...], gists: int) -> list[dict[str, Any]]:
    """Inputs of one layout with other pictures and other texts."""
    with gist_tokens(gists):
        return [make_inputs(family, samples, padding="left", seed=seed) for seed in (0, 7)]


def watched(model: Any, inputs: Mapping[str, Any], held: Any = None) -> Watch:
    """Run a forward and see what it does; on a cache, all that it holds are values."""
    given = Arguments.of(inputs)
    tensors = {name: tensor.clone() for name, tensor in given.tensors.items()}
    special = special_ids(find_adapter(model).base.config, (GIST,))
    values = [*model.parameters(), *(tensors[name] for name in given.values), *stored(held)]
    copies = [(tensors[name], copy) for name, copy in given.host.items()]
    ids = [tensors["input_ids"], given.host["input_ids"]]
    with torch.no_grad(), knowing(copies), Watch(values, ids, special, strict=False) as watch:
        model(**tensors, **given.plain, **{CACHE: held} if held is not None else {})
    return watch


def stored(held: Any) -> list[Tensor]:
    """Tensors of a cache."""
    parts = [vars(layer) for layer in getattr(held, "layers", ())]
    parts += [vars(part["slots"]) for part in parts if "slots" in part]
    return [tensor for part in parts for tensor in part.values() if isinstance(tensor, Tensor)]


def differences(first: Watch, second: Watch) -> list[str]:
    """What keeps two runs from being one fixed sequence."""
    found = [*first.refused, *second.refused]
    if first.log != second.log:
        places = zip(first.log, second.log, strict=False)
        found.append(f"another operation: {next((p for p in places if p[0] != p[1]), 'more')}")
    return found


def prefill_differs(
    model: Any, family: str, compressor: Compressor, samples: tuple[Sample, ...]
) -> list[str]:
    first, second = pair(family, samples, int(compressor.name in GISTS))
    with compressed(model, compressor):
        with torch.no_grad():
            model(**first)
        return differences(watched(model, first), watched(model, second))


@pytest.mark.some(cases=24)
@pytest.mark.parametrize(
    ("family", "method", "batch"),
    cases("fixed sequence", every_method=True, turning=["one", "padded"]),
)
def test_a_prefill_is_one_unless_its_method_says_why_not(
    family: str, method: str, batch: str
) -> None:
    compressor, samples = make(family, method), {"one": ONE, "padded": SAMPLES}[batch]
    found = prefill_differs(model_of(family), family, compressor, samples)
    assert bool(found) == (compressor.uncapturable() is not None), found


@pytest.mark.some(cases=7)
@pytest.mark.parametrize(("family", "method"), VIDEO_CASES)
def test_so_is_that_of_videos(family: str, method: str) -> None:
    compressor = make(family, method)
    found = prefill_differs(model_of(family), family, compressor, VIDEO_SAMPLES)
    assert bool(found) == (compressor.uncapturable() is not None), found


@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_settings_that_let_images_decide_say_so(method: str, options: dict[str, Any]) -> None:
    compressor = make_compressor(method, **options)
    assert compressor.uncapturable()
    assert prefill_differs(model_of("llava"), "llava", compressor, SAMPLES)


@pytest.mark.parametrize(
    ("family", "method", "kind"), cases("fixed step", turning=["dynamic", "static"])
)
def test_a_step_is_one(family: str, method: str, kind: str) -> None:
    model, compressor, found = model_of(family), make(family, method), []
    with compressed(model, compressor):
        for inputs in pair(family, SAMPLES, int(method in GISTS)):
            config, length = model.config.get_text_config(), inputs["input_ids"].shape[1]
            held = DynamicCache() if kind == "dynamic" else StaticCache(config, length + 4)
            try:
                with torch.no_grad():
                    model(**inputs, **{CACHE: held})
            except UnsupportedModelError:
                assert kind == "static"
                return
            watch = None
            for step in range(2):
                watch = watched(model, one_token(model, inputs, length + step), held)
            found.append(watch)
    if compressor.uncapturable() is None:
        assert differences(*found) == []
    assert not any(watch.refused for watch in found)


def one_token(model: Any, inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """A step that all families take, with position ids of their own."""
    ids = inputs["input_ids"][:, -1:]
    mask = torch.nn.functional.pad(
        inputs["attention_mask"], (0, length + 1 - inputs["attention_mask"].shape[1]), value=1
    )
    places = (mask.cumsum(-1) - 1)[:, -1:]
    if hasattr(model.model, "rope_deltas"):
        places = places.expand(3, -1, -1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": places}


class Reads(nn.Module):
    """Reads something of its input on the host."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, ids: Tensor, mask: Tensor) -> Any:
        return self.how(x, ids, mask)


def added(sums: list[Tensor], x: Tensor) -> Tensor:
    """Written on by an operation that gives nothing."""
    torch._foreach_add_(sums, [x])
    return sums[0]


READS: list[tuple[Any, bool]] = [
    (lambda x, ids, mask: x.sum().item(), True),
    (lambda x, ids, mask: x.tolist(), True),
    (lambda x, ids, mask: x.cpu(), True),
    (lambda x, ids, mask: x[x > 0], True),
    (lambda x, ids, mask: (x > 0).nonzero(), True),
    (lambda x, ids, mask: bool((ids > 4).any()), True),
    (lambda x, ids, mask: ids.tolist(), True),
    (lambda x, ids, mask: torch.zeros(3).masked_fill_(x > 0, 1.0).tolist(), True),
    (lambda x, ids, mask: x + torch.rand(3), True),
    (lambda x, ids, mask: added([torch.zeros(3)], x).tolist(), True),
    (lambda x, ids, mask: x[ids == 5], False),
    (lambda x, ids, mask: int((ids == 5).sum()), False),
    (lambda x, ids, mask: mask.nonzero().tolist(), False),
    (lambda x, ids, mask: torch.topk(x, 2), False),
    (lambda x, ids, mask: x[mask], False),
    (lambda x, ids, mask: torch.tensor([mask.sum(), 4]) + x.new_tensor([2, 3]), False),
    (lambda x, ids, mask: torch.as_tensor(x) + x[torch.topk(x, 3).indices, ...], False),
    (lambda x, ids, mask: torch.tensor([x.sum(), 4]), True),
    (lambda x, ids, mask: x.view(1, 3)[mask[:1], x.argmax()[None]], False),
]


@pytest.mark.parametrize(("how", "refused"), READS)
def test_what_the_host_reads_of_values_is_refused(how: Any, refused: bool) -> None:
    x, ids, mask = torch.randn(3), torch.tensor([1, 5, 2]), torch.tensor([True, False, True])
    module = Reads(how)
    if refused:
        with pytest.raises(NotFixedError), Watch([x], [ids], [5]):
            module(x, ids, mask)
        return
    with Watch([x], [ids], [5]) as first:
        module(x, ids, mask)
    other = x.flip(0)
    expected = module(other, ids, mask)
    with Watch([other], [ids], [5], answers=first):
        again = module(other, ids, mask)
    assert not first.refused
    assert str(again) == str(expected)


def test_a_second_run_that_reads_more_is_refused() -> None:
    x, mask = torch.randn(3), torch.tensor([True, False, True])
    with Watch([x]) as first:
        mask.nonzero()
    second = Watch([x], answers=first)
    with second:
        mask.nonzero()
    with pytest.raises(NotFixedError, match="something else"), second:
        mask.nonzero()


def test_a_model_of_one_layer_is_watched_like_any() -> None:
    model = build("llava", layers=1)
    inputs = pair("llava", ONE, 0)
    assert differences(*(watched(model, each) for each in inputs)) == []
