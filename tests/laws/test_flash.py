"""FlashAttention's calling convention, with an emulated kernel: 2-D masks, none without padding."""

from collections.abc import Iterator

import pytest
import torch
from tests.laws.cases import FAMILIES, inputs_of, make, run
from tests.laws.emulated_flash import CALLS, NAME, emulating
from tests.tiny import Image, Sample, Text, build, make_inputs

from vispress import compressed


@pytest.fixture
def flash() -> Iterator[None]:
    with emulating():
        yield


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
