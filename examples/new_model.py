"""A model family of your own: say where things are, register it, compress it.

DeepSeek-VL, for one, is no family of vispress. The model here is tiny and random.

python examples/new_model.py
"""

import torch
from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration

from vispress import compressed, compression_report, register_adapter
from vispress.adapters.base import ModelAdapter


@register_adapter("DeepseekVLModel")
class DeepseekVLAdapter(ModelAdapter):
    """SigLIP patches, each a token, in raster order."""

    family = "deepseek_vl"

    def placeholders(self):
        return {"image": self.base.config.image_token_id}

    def encoder_attentions(self):
        return [layer.self_attn for layer in self.base.vision_model.encoder.layers]

    def feature_layer(self):
        return len(self.encoder_attentions()) - 1

    @property
    def projector(self):
        return self.base.aligner

    def projector_inputs(self, modality, raw, call):
        return raw  # [images, patches, width]

    def pack(self, modality, values, call):
        return tuple(values)  # of each image, [patches, anything]

    def layouts(self, modality, counts, call):
        sides = [int(count**0.5) for count in counts]
        return [((1, side, side), None) for side in sides]


small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
config = DeepseekVLConfig(
    text_config=small | {"model_type": "llama", "num_hidden_layers": 4, "vocab_size": 128},
    vision_config=small | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 4},
    image_token_id=100,
)
torch.manual_seed(0)
model = DeepseekVLForConditionalGeneration(config).eval()
inputs = {
    "input_ids": torch.tensor([[5, 6, *[100] * 64, 7, 8, 9]]),
    "attention_mask": torch.ones(1, 69, dtype=torch.long),
    "pixel_values": torch.randn(1, 3, 32, 32),
}
for method in ("divprune", "fastv"):
    with compressed(model, method, keep_ratio=0.25):
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
        print(compression_report(model))
