"""Masks that a later call changes over what is cached, and 4-D masks that add biases."""

from typing import Any

import pytest
import torch
from tests.laws.cases import logits_of, make, model_of
from tests.tiny import Image, Sample, Text, make_inputs
from torch import Tensor
from transformers import DynamicCache, StaticCache

from vispress import compressed
from vispress.errors import ConfigError
from vispress.runtime.kv_cache.hf_compat import CACHE

TURN = torch.tensor([[9, 8, 7]])
METHODS = ("divprune", "fastv", "visionzip", "pyramiddrop", "lvlm_csp", "attended_cache")


def prompt() -> dict[str, Any]:
    return make_inputs("llava", [Sample([Text(5), Image(), Text(7)])])


def second_turn(model: Any, mask: Tensor, split: bool = False) -> Tensor:
    """Logits of a turn of text behind a prefill, under a mask of its own."""
    cache, inputs = DynamicCache(), prompt()
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        model(**inputs, **{CACHE: cache})
        if not split:
            return model(input_ids=TURN, attention_mask=mask, **{CACHE: cache}).logits
        steps = [
            model(input_ids=TURN[:, i : i + 1], attention_mask=mask[:, : length + i + 1],
                  **{CACHE: cache}).logits
            for i in range(3)
        ]  # fmt: skip
        return torch.cat(steps, dim=1)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_an_old_turn_that_a_later_mask_hides_is_hidden(method: str, split: bool) -> None:
    model, length = model_of("llava"), prompt()["input_ids"].shape[1]
    shown = torch.ones(1, length + 3, dtype=torch.long)
    hidden = shown.clone()
    hidden[:, :length] = 0
    expected = second_turn(model, hidden, split)
    with compressed(model, make("llava", method), positions="original"):
        got = second_turn(model, hidden, split)
        assert (second_turn(model, shown, split) - got).abs().max() > 1
    assert (got - expected).abs().max() < 1e-9


def test_a_mask_of_the_chunk_alone_is_refused() -> None:
    with (
        compressed(model_of("llava"), "fastv", keep_ratio=0.4),
        pytest.raises(ConfigError, match="attention_mask has 3 columns, but the KV cache holds"),
    ):
        second_turn(model_of("llava"), torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("method", "static"), [(m, False) for m in METHODS] + [("divprune", True), ("fastv", True)]
)
def test_padding_that_a_later_call_shows_is_refused(method: str, static: bool) -> None:
    model = model_of("llava")

    def new_cache() -> Any:
        if not static:
            return DynamicCache()
        return StaticCache(config=model.config.get_text_config(), max_cache_len=80)

    samples = [Sample([Text(5), Image(), Text(7)]), Sample([Text(2), Image(), Text(3)])]
    inputs, step = make_inputs("llava", samples, padding="left"), torch.full((2, 2), 9)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(step)], dim=1)
    with compressed(model, make("llava", method)), torch.no_grad():
        for shown in ({}, {"attention_mask": torch.ones_like(mask)}):
            cache = new_cache()
            model(**inputs, **{CACHE: cache})
            with pytest.raises(ConfigError, match="give the mask of the whole conversation"):
                model(input_ids=step, **shown, **{CACHE: cache})
        whole = new_cache()
        model(**inputs, **{CACHE: whole})
        model(input_ids=step, attention_mask=mask, **{CACHE: whole})
        one = make_inputs("llava", samples[:1])
        model(**one, **{CACHE: (alone := new_cache())})
        model(input_ids=step[:1], **{CACHE: alone})  # no padding, no mask


@pytest.mark.parametrize(("attn", "rank"), [("eager", 2), ("eager", 4), ("sdpa", 2), ("sdpa", 4)])
def test_a_step_that_shows_padding_is_refused(attn: str, rank: int) -> None:
    samples = [Sample([Text(5), Image(), Text(7)]), Sample([Text(2), Image(), Text(3)])]
    model, inputs = model_of("llava", attn=attn), make_inputs("llava", samples, padding="left")
    step = torch.full((2, 1), 9)
    kept = torch.cat([inputs["attention_mask"], torch.ones_like(step)], dim=1)

    def decoded(mask: Tensor) -> Tensor:
        model(**inputs, **{CACHE: (cache := DynamicCache())})
        mask = mask if rank == 2 else mask.bool()[:, None, None]
        logits: Tensor = model(input_ids=step, attention_mask=mask, **{CACHE: cache}).logits
        return logits

    with compressed(model, make("llava", "fastv")), torch.no_grad():
        decoded(kept)
        with pytest.raises(ConfigError, match="give the mask of the whole conversation"):
            decoded(torch.ones_like(kept))


def test_padding_of_a_turn_before_the_first_image_is_not_shown_either() -> None:
    model, words = model_of("llava"), torch.full((2, 4), 9)
    pad = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    inputs = make_inputs("llava", [Sample([Text(5), Image(), Text(7)])] * 2)
    mask = torch.cat([pad, inputs["attention_mask"]], dim=1)
    with compressed(model, make("llava", "fastv")), torch.no_grad():
        cache = DynamicCache()
        model(input_ids=words, attention_mask=pad, **{CACHE: cache})
        model(**inputs | {"attention_mask": mask}, **{CACHE: cache})
        shown = torch.ones(2, mask.shape[1] + 1, dtype=torch.long)
        with pytest.raises(ConfigError, match="give the mask of the whole conversation"):
            model(input_ids=words[:, :1], attention_mask=shown, **{CACHE: cache})


@pytest.mark.parametrize("method", METHODS)
def test_a_bias_in_a_mask_blocks_nothing(method: str) -> None:
    model, inputs = model_of("llava"), prompt()
    length = inputs["input_ids"].shape[1]
    blocked = torch.ones(length, length).triu(1).bool()
    none = torch.zeros(1, 1, length, length, dtype=torch.float64)
    column = torch.zeros_like(none)
    column[..., 2] = -1e-9
    diagonal = -1e-9 * torch.eye(length, dtype=torch.float64)[None, None]
    with compressed(model, make("llava", method)) as report:
        found = []
        for bias in (none, column, diagonal, -1e-9 - diagonal, none - 1e-9):
            mask = bias.masked_fill(blocked, torch.finfo(torch.float64).min)
            logits = logits_of(model, inputs | {"attention_mask": mask, "use_cache": False})
            alive = report.alive(report.num_layers - 1)
            found.append((logits, alive))
    for logits, alive in found[1:]:
        assert torch.equal(alive, found[0][1])
        assert (logits - found[0][0])[alive].abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_a_report_does_not_follow_a_mask_that_is_written_on(dtype: torch.dtype) -> None:
    samples = [Sample([Text(5), Image(), Text(7)]), Sample([Text(2), Image(), Text(3)])]
    inputs = make_inputs("llava", samples, padding="left")
    mask = inputs["attention_mask"].to(dtype, copy=True)
    with compressed(model_of("llava"), make("llava", "fastv")) as report:
        logits_of(model_of("llava"), inputs | {"attention_mask": mask, "use_cache": False})
        mask[:] = 1
        assert torch.equal(report.alive(0), inputs["attention_mask"].bool())
