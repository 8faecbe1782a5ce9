"""Layers with linear attention: what is refused, and what their states hold."""

from typing import Any

import pytest
import torch
from tests.families import NEWER, TABLE
from tests.families.glm import GLM
from tests.laws.cases import SAMPLES, VIDEO_SAMPLES, inputs_of, logits_of, make, model_of, run
from tests.laws.packing import pack
from tests.laws.test_law01_prune_equals_mask import assert_equals_oracle
from tests.laws.test_law09_generation_modes import generate, new_cache
from tests.tiny import make_inputs
from transformers import DynamicCache

from vispress import capture, compress_model, compressed
from vispress.errors import CompressionStateError, UnsupportedMethodError, UnsupportedModelError
from vispress.methods import DivPrune, FastV
from vispress.runtime.kv_cache.hf_compat import CACHE

HYBRID = [name for name in NEWER if TABLE[name].hybrid]
pytestmark = pytest.mark.skipif(not HYBRID, reason="transformers is too old for them")


@pytest.mark.parametrize("family", HYBRID)
def test_rows_leave_before_layers_of_either_kind(family: str) -> None:
    """Layer 4, the first behind an attention that is read, has linear attention."""
    chain = [DivPrune(keep_ratio=0.7), FastV(keep_ratio=0.5, layer=4)]
    for padding in ("left", "right"):
        inputs = inputs_of(family, padding)
        assert_equals_oracle(model_of(family), inputs, run(model_of(family), inputs, chain))


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("fastv", {"layer": 2}, "reads the attention of decoder layer 1"),
        ("pmod", {}, "the cache or the MLP of decoder layer"),
        ("voco", {}, "the cache or the MLP of decoder layer"),
    ],
)
def test_what_needs_attention_of_such_a_layer_is_refused(
    method: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UnsupportedMethodError, match=says) as caught:
        compress_model(model_of("qwen3_5"), make("qwen3_5", method, **options))
    assert "0, 2, 3" in str(caught.value)


def test_chunks_of_one_prompt_are_the_prompt() -> None:
    model, inputs = model_of("qwen3_5"), make_inputs("qwen3_5", SAMPLES, only=2)
    with compressed(model, "divprune", keep_ratio=0.4):
        whole, chunks = generate(model, inputs), generate(model, inputs, prefill_chunk_size=7)
        with pytest.raises(UnsupportedModelError, match="unequal numbers of tokens"):
            generate(model, inputs_of("qwen3_5"), prefill_chunk_size=7)
    assert torch.equal(whole.sequences, chunks.sequences)
    assert (torch.stack(whole.logits) - torch.stack(chunks.logits)).abs().max() < 1e-5


def test_packed_rows_graphs_and_other_caches_are_refused() -> None:
    model = model_of("qwen3_5")
    packed = pack("qwen3_5", model, SAMPLES, ((0, 1), (2,)))
    with compressed(model, "divprune", keep_ratio=0.4):
        with pytest.raises(UnsupportedModelError, match="several documents"):
            logits_of(model, packed.inputs)
        with pytest.raises(UnsupportedModelError, match="DynamicCache\\(config="):
            model(**inputs_of("qwen3_5"), **{CACHE: DynamicCache()})
    with pytest.raises(UnsupportedModelError, match="layers with linear attention"):
        capture(model, backend="tape")


def test_a_cache_of_an_interrupted_forward_is_refused() -> None:
    model, inputs = model_of("qwen3_5"), inputs_of("qwen3_5")
    cache = new_cache(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with compressed(model, "divprune", keep_ratio=0.4):
        hook = model.model.language_model.layers[2].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            logits_of(model, inputs | {CACHE: cache})
        hook.remove()
        with pytest.raises(CompressionStateError, match="interrupted forward"):
            logits_of(model, inputs | {CACHE: cache})
        cache.reset()
        assert torch.equal(logits_of(model, inputs | {CACHE: cache}), logits_of(model, inputs))


@pytest.mark.parametrize("method", ["evs", "fastv"])
@pytest.mark.parametrize("family", GLM)
def test_videos_under_the_token_of_images_equal_the_masked_model(family: str, method: str) -> None:
    inputs = make_inputs(family, VIDEO_SAMPLES, padding="left")
    result = run(model_of(family), inputs, make(family, method))
    kinds = [[image.modality for image in sample.images] for sample in result.report.samples]
    assert kinds == [["video"], ["video"]]
    assert_equals_oracle(model_of(family), inputs, result)
