"""FastVLM, whose encoder comes from timm: its few tokens are pruned as any others."""

import pytest
import torch

pytest.importorskip("timm", reason="FastVLM's encoder comes from timm")

from tests.laws.cases import make, run
from tests.laws.oracle import oracle_expand, oracle_forward
from tests.tiny_models import IMAGE_ID, PAD, VOCAB
from transformers import FastVlmConfig, FastVlmForConditionalGeneration

from vispress import unsupported_methods

TEXT = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
}
SMALL = {"inference_mode": True, "layers": (1,) * 5, "embed_dims": (8, 16, 16, 32, 32)}
VISION = {"model_type": "timm_wrapper", "architecture": "fastvit_mci3", "do_pooling": True}


def test_methods_behind_the_encoder_equal_the_masked_model_and_others_are_refused() -> None:
    vision = VISION | {"global_pool": "avg", "hidden_size": 64, "model_args": SMALL}
    config = FastVlmConfig(text_config=TEXT, vision_config=vision, image_token_id=IMAGE_ID)
    torch.manual_seed(0)
    model = FastVlmForConditionalGeneration(config).double().eval()
    image = [IMAGE_ID] * 16
    rows = [[5, 6, *image, 7, 8, 9, *image, 10], [4, *image, 11, 12]]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    real = ids != PAD
    pixels = torch.randn(3, 3, 256, 256, dtype=torch.float64)
    inputs = {"input_ids": ids, "attention_mask": real.long(), "pixel_values": pixels}
    refused = unsupported_methods(model)
    assert {"fastervlm", "visionzip", "hiprune", "tome", "pvc"} <= set(refused)
    for method in ("divprune", "fastv", "pyramiddrop", "zoo_prune", "avg_pool"):
        assert method not in refused
        result = run(model, inputs, make("llava", method))
        expected = oracle_forward(model, inputs, result.alive, result.positions, result.values)
        expected = oracle_expand(expected, result.alive[-1])
        assert (result.logits - expected)[real].abs().max() < 1e-5
