"""FlashAttention's calling convention, with an emulated kernel: 2-D masks, none without padding."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.laws.cases import FAMILIES, inputs_of, make, run
from tests.tiny import Image, Sample, Text, build, make_inputs
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from vispress import compressed

CALLS: list[tuple[int, bool]] = []


def emulated(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal from the bottom right; a 2-D mask says which keys are real; gapped ids: packing."""
    assert mask is None or mask.shape == (k.shape[0], k.shape[2])
    ids = kwargs.get("position_ids")
    assert ids is None or bool((ids.diff() <= 1).all())
    CALLS.append((k.shape[2], mask is None))
    P, S, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    allow = (torch.arange(S) <= torch.arange(S - P, S)[:, None])[None, None]
    if mask is not None:
        allow = allow & mask[:, None, None].bool()
        allow = allow | ~allow.any(-1, keepdim=True)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allow, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture
def flash() -> Iterator[None]:
    AttentionInterface.register("flash_emulated", emulated)
    AttentionMaskInterface.register("flash_emulated", flash_attention_mask)
    CALLS.clear()
    yield
    AttentionInterface._global_mapping.pop("flash_emulated")
    AttentionMaskInterface._global_mapping.pop("flash_emulated")


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("method", ["fastv", "divprune", "pyramiddrop", "transprune"])
@pytest.mark.parametrize("family", FAMILIES)
def test_flash_masks_give_what_sdpa_gives(family: str, method: str) -> None:
    model, inputs = build(family), inputs_of(family)
    config = model.model.language_model.config
    real = inputs["attention_mask"].bool()
    out = {}
    for implementation in ("sdpa", "flash_emulated"):
        config._attn_implementation = implementation
        result = run(model, inputs, make(family, method))
        with compressed(model, make(family, method)):
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        out[implementation] = (result.logits[real], tokens)
    assert CALLS, "the emulated kernel never ran"
    assert (out["sdpa"][0] - out["flash_emulated"][0]).abs().max() < 1e-9
    assert torch.equal(out["sdpa"][1], out["flash_emulated"][1])


@pytest.mark.usefixtures("flash")
def test_a_single_prompt_needs_no_mask_at_all() -> None:
    model = build("llava")
    inputs = make_inputs("llava", [Sample([Text(5), Image(), Text(5)])])
    model.model.language_model.config._attn_implementation = "flash_emulated"
    with compressed(model, make("llava", "fastv")):
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert CALLS
    assert all(no_mask for _, no_mask in CALLS)
