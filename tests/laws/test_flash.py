"""FlashAttention's calling convention, with an emulated kernel: 2-D masks, none without padding."""

from collections.abc import Iterator

import pytest
import torch
from tests.laws.cases import FAMILIES, inputs_of, make, run
from tests.laws.emulated_flash import CALLS, NAME, emulating
from tests.tiny import Image, Sample, Text, build, make_inputs
from transformers import DynamicCache

from vispress import compressed
from vispress.runtime.kv_cache.hf_compat import CACHE


@pytest.fixture
def flash() -> Iterator[None]:
    with emulating():
        yield


@pytest.mark.some(cases=8)
@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("method", ["fastv", "divprune", "pyramiddrop", "transprune"])
@pytest.mark.parametrize("family", FAMILIES)
def test_flash_masks_give_what_sdpa_gives(family: str, method: str) -> None:
    model, inputs = build(family), inputs_of(family)
    config = model.model.language_model.config
    real = inputs["attention_mask"].bool()
    out = {}
    for implementation in ("sdpa", NAME):
        config._attn_implementation = implementation
        result = run(model, inputs, make(family, method))
        with compressed(model, make(family, method)):
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        out[implementation] = (result.logits[real], tokens)
    assert CALLS, "the emulated kernel never ran"
    assert (out["sdpa"][0] - out[NAME][0]).abs().max() < 1e-9
    assert torch.equal(out["sdpa"][1], out[NAME][1])


@pytest.mark.usefixtures("flash")
def test_a_single_prompt_needs_no_mask_at_all() -> None:
    model = build("llava")
    inputs = make_inputs("llava", [Sample([Text(5), Image(), Text(5)])])
    model.model.language_model.config._attn_implementation = NAME
    with compressed(model, make("llava", "fastv")):
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert CALLS
    assert all(call.mask is None for call in CALLS)


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm"])
def test_an_image_in_a_later_turn_is_ranked_as_in_one_prompt(method: str) -> None:
    """Causality is in no mask here: rows that are read stand behind what the cache holds."""
    model = build("llava")
    first = torch.randint(3, 100, (1, 6), generator=torch.Generator().manual_seed(1))
    second = make_inputs("llava", [Sample([Text(3), Image(4, 6), Text(6)])], seed=5)
    ids = torch.cat([first, second["input_ids"]], dim=1)
    model.model.language_model.config._attn_implementation = NAME
    found = []
    with compressed(model, make("llava", method)) as report, torch.no_grad():
        cache = DynamicCache()
        model(input_ids=first, **{CACHE: cache})
        rest = {name: value for name, value in second.items() if name != "attention_mask"}
        for inputs in (rest | {CACHE: cache}, rest | {"input_ids": ids}):
            model(**inputs)
            found.append([p.kept for i in report.samples[0].images for p in i.placements])
    assert found[0] == found[1]
