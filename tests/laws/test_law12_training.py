"""Law 12 in training: packed rows have the loss and the gradients of the padded batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from tests.laws.cases import FAMILIES, QWEN, cases, make, model_of, real_positions
from tests.laws.emulated_flash import VARLEN, emulating, running_flash
from tests.laws.packing import DOCUMENTS, positions_of
from tests.laws.test_law10_training import (
    EXACT,
    assert_equal,
    backward,
    checkpointing,
    gradients,
    trained,
    training,
)
from tests.tiny import make_inputs
from torch import Tensor
from transformers import DataCollatorWithFlattening

from vispress import compressed

ROUNDED = 1e-5  # a loss is taken on fp32 logits
ANSWER = 2
"""Tokens at the end of each sample that a loss is taken on."""


class Flattening(DataCollatorWithFlattening):  # type: ignore[misc]
    """Flatten multimodal samples: transformers' collator for tokens, pixels beside them.

    Args:
        family: Of the model.
        model: Gives M-RoPE positions.
        options: Of transformers' collator.
    """

    def __init__(self, family: str, model: Any, **options: Any) -> None:
        super().__init__(**options)
        self.family, self.model = family, model

    def __call__(self, features: Sequence[Mapping[str, Any]], *_: Any, **__: Any) -> dict[str, Any]:
        tokens = [{n: f[n][0] for n in ("input_ids", "labels")} for f in features]
        batch: dict[str, Any] = dict(super().__call__(tokens, return_tensors="pt"))
        pixels = {name for f in features for name in f} - {"attention_mask", *tokens[0]}
        for name in sorted(pixels):
            parts = [f[name] for f in features if name in f]
            batch[name] = torch.cat(parts, dim=1) if "token" in name else _joined(parts)
        if self.family in QWEN:
            places = [positions_of(self.family, self.model, f) for f in features]
            batch["position_ids"] = torch.cat(places, dim=-1)
        return batch


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Along the first axis; AnyRes images are padded to the most crops."""
    if parts[0].ndim == 5:
        most = max(part.shape[1] for part in parts)
        parts = [
            torch.cat([p, p.new_zeros(len(p), most - p.shape[1], *p.shape[2:])], 1) for p in parts
        ]
    return torch.cat(list(parts))


def both_ways(family: str, model: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The padded batch and the packed row of the same samples, with labels on answers."""
    batch = real_positions(family, make_inputs(family, DOCUMENTS, padding="right"))
    last = batch["attention_mask"].flip(1).cumsum(1).flip(1)
    taught = (last > 0) & (last <= ANSWER) & batch["attention_mask"].bool()
    padded = batch | {"labels": batch["input_ids"].masked_fill(~taught, -100)}
    features = []
    for number, _ in enumerate(DOCUMENTS):
        one = make_inputs(family, DOCUMENTS, only=number)
        labels = torch.full_like(one["input_ids"], -100)
        labels[:, -ANSWER:] = one["input_ids"][:, -ANSWER:]
        features.append(one | {"labels": labels})
    packed = Flattening(family, model, **options)(features)
    return padded, packed | {"use_cache": False}


@pytest.mark.parametrize(("family", "method"), cases("packed training"))
def test_loss_and_gradients_are_those_of_the_padded_batch(family: str, method: str) -> None:
    model = model_of(family)
    padded, packed = both_ways(family, model)
    with training(model), compressed(model, make(family, method)) as report:
        expected_loss = model(**padded).loss
        kept = [image.kept for sample in report.samples for image in sample.images]
        expected = gradients(model, expected_loss)
        loss = model(**packed).loss
        assert [image.kept for image in report.samples[0].images] == kept
        got = gradients(model, loss)
    assert abs(loss - expected_loss) < ROUNDED
    assert_equal(got, expected, ROUNDED)


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_a_packed_row_changes_no_gradient(family: str, reentrant: bool) -> None:
    model = trained(family)
    _, packed = both_ways(family, model)
    for method in ("fastv", "pyramiddrop", "lvlm_csp"):
        with training(model), compressed(model, make(family, method)):
            expected = backward(model, model(**packed).loss)
            with checkpointing(model, reentrant=reentrant):
                got = backward(model, model(**packed).loss)
        assert_equal(got, expected)


@pytest.mark.some(cases=3)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_varlen_kernel_gives_the_same_gradients(family: str) -> None:
    model = model_of(family)
    _, packed = both_ways(family, model, return_flash_attn_kwargs=True)
    assert all(name in packed for name in VARLEN)
    for method in ("fastv", "divprune", "pyramiddrop"):
        with training(model), compressed(model, make(family, method)):
            expected_loss = model(**packed).loss
            expected = gradients(model, expected_loss)
            with emulating(), running_flash(model):
                loss = model(**packed).loss
                got = gradients(model, loss)
        assert abs(loss - expected_loss) < EXACT
        assert_equal(got, expected)
