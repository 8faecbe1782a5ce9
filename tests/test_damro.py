"""DAMRO: the contrast by hand, and generation against two models run side by side, uncached."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from tests.laws.cases import model_of
from tests.tiny import Image, Sample, Text, features, make_inputs, visual_positions
from vispress import compressed
from vispress.decoding.damro import DAMRO, contrast
from vispress.errors import CompressionStateError, ConfigError, UnsupportedMethodError

SAMPLES = [
    Sample([Text(3), Image(4, 4), Text(5), Image(4, 4), Text(2)]),
    Sample([Text(2), Image(4, 4), Text(3)]),
    Sample([Text(4)]),
]


def test_worked_example_of_the_specification() -> None:
    z, negative = torch.tensor([[2.0, 1.5, -3.0]]), torch.tensor([[2.5, 0.5, -3.0]])
    got = contrast(z, negative, 0.5, 0.1)
    assert got.tolist() == [[1.75, 2.0, -torch.inf]]  # the threshold is 2 + ln 0.1 = -0.303
    assert contrast(z, negative, 0.5, 0.0)[0, 2] == -3.0
    assert torch.equal(contrast(z, negative, 0.0, 0.0), z)


def generate(model: Any, inputs: dict[str, Any], *processors: Any, **mode: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(
        **inputs, **({"do_sample": False} | mode), max_new_tokens=4, min_new_tokens=4,
        logits_processor=LogitsProcessorList(processors), output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip


def wide_cls_scores(model: Any, pixels: Tensor) -> Tensor:
    """`[P, N]`: [CLS] attention with all heads as one, worked out layer by layer."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)  # until transformers 5.2x
    layer = model.config.vision_feature_layer + len(tower.encoder.layers)
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    block = tower.encoder.layers[layer]
    x = block.layer_norm1(hidden[layer])
    q, k = block.self_attn.q_proj(x[:, :1]), block.self_attn.k_proj(x)
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[:, 0, 1:]


@pytest.mark.parametrize("compress", [False, True])
@torch.no_grad()
def test_each_step_contrasts_with_the_outliers_alone(compress: bool) -> None:
    model, inputs = model_of("llava"), make_inputs("llava", SAMPLES, padding="left")
    alpha, beta, k = 1.0, 0.05, 3
    found = features(model, inputs, "image")
    top = wide_cls_scores(model, inputs["pixel_values"]).topk(k).indices
    places = visual_positions("llava", model, inputs)

    def negative(b: int, new: Tensor) -> Tensor:
        """The prompt with outliers in the order of their score, and the new tokens."""
        embeds = model.get_input_embeddings()(inputs["input_ids"][b])
        parts, start = [], int(inputs["attention_mask"][b].argmax())
        number = sum(len(own) for own in places[:b])
        for i, own in enumerate(places[b]):
            parts += [embeds[start : own[0]], found[number + i][top[number + i]]]
            start = int(own[-1]) + 1
        parts += [embeds[start:], model.get_input_embeddings()(new)]
        hidden = model.model.language_model(inputs_embeds=torch.cat(parts)[None], use_cache=False)
        return model.lm_head(hidden.last_hidden_state[:, -1])[0]

    length = inputs["input_ids"].shape[1]
    if compress:
        with compressed(model, "divprune", keep_ratio=0.5):
            damro = DAMRO(model, inputs, num_outliers=k, alpha=alpha, beta=beta)
            out = generate(model, inputs, damro)
            again = generate(model, inputs, damro)
    else:
        damro = DAMRO(model, inputs, num_outliers=k, alpha=alpha, beta=beta)
        out, again = generate(model, inputs, damro), generate(model, inputs, damro)
    assert torch.equal(out.sequences, again.sequences)
    for step, scores in enumerate(out.scores):
        ids = out.sequences[:, : length + step]
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, step).long()], dim=1)
        whole = inputs | {"input_ids": ids, "attention_mask": mask}
        whole["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if compress:
            continue
        z = model(**whole, use_cache=False).logits[:, -1]
        other = torch.stack([negative(b, ids[b, length:]) for b in range(3)])
        # generate hands over its logits in fp32
        expected = contrast(z.float(), other.float(), alpha, beta)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    # without a picture both branches say the same: only unlikely words are ruled out
    plain = generate(model, inputs)
    assert torch.equal(out.sequences[2], plain.sequences[2])


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_a_batch_is_what_each_prompt_is_alone(family: str) -> None:
    model, batch = model_of(family), make_inputs(family, SAMPLES[:2], padding="left")
    how: Any = {} if family == "llava_next" else {"scores": "column_mean"}
    together = generate(model, batch, DAMRO(model, batch, num_outliers=4, **how))
    for b in range(2):
        alone = make_inputs(family, SAMPLES[:2], only=b)
        got = generate(model, alone, DAMRO(model, alone, num_outliers=4, **how))
        length = alone["input_ids"].shape[1]
        new = together.sequences[b, batch["input_ids"].shape[1] :]
        assert torch.equal(new, got.sequences[0, length:])


def test_a_thumbnail_gives_its_outliers_and_one_newline() -> None:
    model = model_of("llava_next")
    inputs = make_inputs("llava_next", SAMPLES[:2], padding="left")
    damro = DAMRO(model, inputs, num_outliers=4)
    # 3 + 5 + 2 words and two pictures of 4 + 1; 2 + 3 words and one picture
    assert damro._mask.sum(dim=1).tolist() == [10 + 2 * 5, 5 + 5]


def test_several_samples_of_a_prompt_are_followed_and_beams_are_refused() -> None:
    model, inputs = model_of("llava"), make_inputs("llava", SAMPLES, padding="left")
    damro = DAMRO(model, inputs)
    out = generate(model, inputs, damro, do_sample=True, num_return_sequences=2)
    assert out.sequences.shape[0] == 6
    step = damro._seen
    with pytest.raises(CompressionStateError, match="beam search"):
        damro(torch.cat([step.flip(0), step[:, :1]], dim=1), torch.zeros(6, 128))
    other = make_inputs("llava", SAMPLES, padding="left", seed=1)
    with pytest.raises(CompressionStateError, match="other prompts"):
        generate(model, other, damro)


def test_bad_arguments_are_refused() -> None:
    model, inputs = model_of("llava"), make_inputs("llava", SAMPLES[:1])
    for bad in ({"num_outliers": 0}, {"alpha": -1.0}, {"beta": 2.0}, {"heads": "all"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            DAMRO(model, inputs, **bad)
    with pytest.raises(ConfigError, match="without pixel_values"):
        DAMRO(model, {"input_ids": inputs["input_ids"]})
    qwen = make_inputs("qwen2_vl", SAMPLES[:1])
    with pytest.raises(UnsupportedMethodError, match="column_mean"):
        DAMRO(model_of("qwen2_vl"), qwen)
