"""What a model attends to, as a target: read by the runtime, compared with eager attention maps."""

from typing import Any

import pytest
import torch
from tests.tiny import Image, Sample, Text, build, make_inputs

from vispress import compress_model
from vispress.distillation.targets import layers_to_read, listen
from vispress.errors import CompressionStateError, ConfigError

SAMPLES = (
    Sample([Text(5), Image(4, 4), Text(7)]),
    Sample([Text(2), Image(4, 4), Text(3), Image(4, 4), Text(4)]),
    Sample([Text(6), Image(4, 4)]),  # nothing is asked
)


class Fed:
    """What `listen` sees of a loaded model: prompts are numbers of samples."""

    def __init__(self, family: str) -> None:
        self.model: Any = build(family, dtype=torch.float32, attn="eager")
        self.family = family

    def encode(self, prompts: list[int]) -> dict[str, Any]:
        only = prompts[0] if len(prompts) == 1 else None
        return make_inputs(self.family, SAMPLES, padding="left", only=only, dtype=torch.float32)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_targets_are_those_of_the_attention_maps(family: str) -> None:
    fed = Fed(family)
    heard = list(listen(fed, range(2), batch_size=1))  # type: ignore[arg-type]
    assert len(heard) == 3
    found = 0
    for number in range(2):
        inputs = fed.encode([number])
        with torch.no_grad():
            maps = fed.model(**inputs, output_attentions=True, use_cache=False).attentions
        first, second = (maps[layer][0].mean(0) for layer in layers_to_read(6))
        visual = inputs["input_ids"][0] == fed.model.config.image_token_id
        places = visual.nonzero()[:, 0]
        runs = places.tensor_split((places.diff() != 1).nonzero()[:, 0] + 1)
        for run in runs:
            asks = [p for p in range(int(run[-1]) + 1, len(visual)) if not visual[p]]
            shares = [rows / rows.sum() for rows in (
                first[asks][:, run].mean(0), first[asks[-1], run], second[asks][:, run].mean(0)
            )]  # fmt: skip
            target = ((shares[0] + shares[1]) / 2 + shares[2]) / 2
            assert torch.allclose(heard[found].target, target, atol=1e-5)
            assert heard[found].features.shape == (
                len(run),
                fed.model.config.text_config.hidden_size,
            )
            assert len(heard[found].text) == len(asks)
            found += 1


def test_batches_change_nothing_and_the_model_is_as_it_was() -> None:
    fed = Fed("llava")
    before = {name: value.clone() for name, value in fed.model.state_dict().items()}
    shown: list[int] = []
    alone = list(listen(fed, range(3), batch_size=1))  # type: ignore[arg-type]
    together = list(listen(fed, range(3), batch_size=3, advance=shown.append))  # type: ignore[arg-type]
    assert shown == [3]
    assert len(alone) == len(together) == 3  # an image that nobody asks about is left out
    for one in together:
        assert one.target.sum() == pytest.approx(1.0)
        assert any(
            len(one.text) == len(other.text) and torch.allclose(one.target, other.target, atol=1e-5)
            for other in alone
        )
    assert fed.model.state_dict().keys() == before.keys()


def test_a_compressed_model_is_not_listened_to() -> None:
    fed = Fed("llava")
    compress_model(fed.model, "fastv", keep_ratio=0.5)
    with pytest.raises(CompressionStateError):
        next(listen(fed, range(1)))  # type: ignore[arg-type]


def test_layers_lie_below_the_last() -> None:
    assert layers_to_read(6) == (2, 4)
    assert layers_to_read(32) == (10, 21)
    assert layers_to_read(2) == (0,)
    assert layers_to_read(3) == (1,)
    with pytest.raises(ConfigError, match="the model has 1"):
        layers_to_read(1)
