"""What prompts of one layout share is made once, and nothing tells that from making it anew."""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.laws.cases import cases, inputs_of, make, model_of
from tests.tiny import Image, Sample, Text, build, make_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vispress import compress_model, compressed, remove_compression
from vispress.api import attachment_of
from vispress.runtime.plan.plan import SURVEYS

FIXED = 15
"""Operations of a prefill beside those of the method, of kernels and of the attention it reads."""
PLACEMENT = 17
"""Likewise of each further placement."""
PARTS = (
    "/vispress_kernels/",
    "/vispress/methods/",
    "attention_reads",
    "/runtime/",
    "/transformers/",
)
MOVED = [Sample([Text(9), Image(4, 4), Text(3)])]
FIRST = [Sample([Text(5), Image(4, 4), Text(7)])]


def logits_of(model: Any, inputs: dict[str, Any], **more: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs, **more).logits
    return logits


@pytest.mark.parametrize(("family", "method"), cases("layout cache"))
def test_a_layout_that_was_seen_gives_the_same_bits(family: str, method: str) -> None:
    model, inputs, compressor = model_of(family), inputs_of(family, method), make(family, method)
    with compressed(model, compressor, cache_layouts=False) as report:
        expected, kept = logits_of(model, inputs), str(report)
        assert not len(attachment_of(model).plan.surveys)
    with compressed(model, compressor) as report:
        assert torch.equal(logits_of(model, inputs), expected)
        assert torch.equal(logits_of(model, inputs), expected)
        assert str(report) == kept
        assert len(attachment_of(model).plan.surveys) == 1


def variants() -> list[dict[str, Any]]:
    """Calls of equal length whose layouts differ in one thing each, and that as other values."""
    first = make_inputs("llava", FIRST)
    masked, labelled, supervised = (dict(first) for _ in range(3))
    masked["attention_mask"] = first["attention_mask"].clone()
    masked["attention_mask"][:, -5:-3] = 0
    for inputs, start in ((labelled, -3), (supervised, -2)):
        labels = torch.full_like(first["input_ids"], -100)
        labels[:, start:] = first["input_ids"][:, start:]
        inputs["labels"] = labels
    restarting = {k: v for k, v in first.items() if k != "attention_mask"}
    length = first["input_ids"].shape[1]
    restarting["position_ids"] = torch.cat([torch.arange(2), torch.arange(length - 2)])[None]
    given = [first | {"prompt_lengths": [length - gone]} for gone in (1, 2)]
    others = [make_inputs("llava", MOVED), make_inputs("llava", FIRST, seed=7)]
    return [first, *others, masked, labelled, supervised, restarting, *given]


@pytest.mark.parametrize("method", ["fastv", "sparsevlm", "cdpruner"])
def test_layouts_are_not_taken_for_each_other(method: str) -> None:
    model, compressor = build("llava"), make("llava", method)
    calls = variants()

    def series(**options: Any) -> list[Tensor]:
        with compressed(model, compressor, **options):
            return [logits_of(model, inputs, use_cache=False) for inputs in (*calls, *calls)]

    for cached, made in zip(series(), series(cache_layouts=False), strict=True):
        assert torch.equal(cached, made)


@pytest.mark.parametrize("method", ["fastv", "cdpruner", "visionzip"])
def test_a_layout_seen_in_inference_mode_is_made_anew_to_train(method: str) -> None:
    model, inputs = build("llava"), make_inputs("llava", FIRST)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :-3] = -100
    with compressed(model, make("llava", method)):
        with torch.inference_mode():
            model(**inputs)
        model(**inputs).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.lm_head.parameters())


def test_so_many_layouts_are_kept_and_no_more() -> None:
    model = build("llava", layers=2)
    compress_model(model, "divprune", keep_ratio=0.5)
    for words in range(3, SURVEYS + 8):
        logits_of(model, make_inputs("llava", [Sample([Text(2), Image(4, 4), Text(words)])]))
    assert len(attachment_of(model).plan.surveys) == SURVEYS


def test_threads_share_it() -> None:
    model = build("llava", layers=4)
    compress_model(model, "fastv", keep_ratio=0.5)
    calls = [
        make_inputs("llava", samples, seed=seed) for seed in range(4) for samples in (FIRST, MOVED)
    ]
    expected = [logits_of(model, inputs) for inputs in calls]
    remove_compression(model)
    compress_model(model, "fastv", keep_ratio=0.5)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for found, wanted in zip(
                pool.map(lambda inputs: logits_of(model, inputs), calls), expected, strict=True
            ):
                assert torch.equal(found, wanted)


class Callers(TorchDispatchMode):
    """Counts operations by the part of vispress that asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.seen[_part(sys._getframe(1))] += 1
        return func(*args, **(kwargs or {}))


def _part(frame: Any) -> str:
    """The innermost part of vispress that runs, or transformers."""
    while frame is not None:
        for part in PARTS:
            if part in frame.f_code.co_filename:
                return part
        frame = frame.f_back
    return ""


@pytest.mark.parametrize("method", ["fastv", "divprune", "pyramiddrop"])
def test_a_seen_layout_costs_a_few_operations(method: str) -> None:
    model = build("llava", dtype=torch.float32)
    inputs = make_inputs("llava", FIRST, dtype=torch.float32)
    with compressed(model, make("llava", method), positions="original"):
        placements = len(attachment_of(model).plan.placements)
        logits_of(model, inputs)
        with Callers() as callers:
            logits_of(model, inputs)
    assert callers.seen["/runtime/"] <= FIXED + PLACEMENT * (placements - 1)
