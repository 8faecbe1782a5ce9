"""A prefill waits for the device once, before its encoder is launched."""

import pytest
import torch
from tests.laws import cases
from tests.tiny import FAMILIES

from vispress import compressed
from vispress.runtime.forward.model_call import ModelCall, by_name


@pytest.mark.parametrize("padding", ["left", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_mask_are_read_from_copies_made_before_the_encoder(family, padding, monkeypatch):
    model = cases.model_of(family)
    inputs = cases.inputs_of(family, "left")
    if padding == "none":
        inputs = cases.make_inputs(family, cases.SAMPLES[:1])
    fetch, on_host, fetched, missed = ModelCall.fetch, ModelCall.on_host, [], []

    def fetching(call):
        assert not call.captures  # no encoder ran in this call
        fetch(call)
        fetched.extend(given for given, _ in call._fetched)

    def reading(call, tensor):
        if not any(tensor is given for given in fetched):
            missed.append(tensor)
        return on_host(call, tensor)

    monkeypatch.setattr(ModelCall, "fetch", fetching)
    monkeypatch.setattr(ModelCall, "on_host", reading)
    with compressed(model, method="uniform", keep_ratio=0.5):
        cases.logits_of(model, inputs)
    sized = [name for name in inputs if name == "image_sizes"]
    assert len(fetched) == 2 + len(sized)
    assert not missed


def test_a_copy_is_made_where_none_was_fetched():
    ids = torch.arange(6).view(2, 3)
    call = ModelCall(None, {"input_ids": ids, "attention_mask": ids[:, :2] > 0})  # shapes differ
    call.fetch()
    assert torch.equal(call.on_host(ids), ids)
    assert torch.equal(call.on_host(ids + 1), ids + 1)
    assert call.on_host(call.arguments["attention_mask"]).tolist() == [[0, 1], [1, 1]]


def test_arguments_by_name():
    def forward(self, a, b=2, *, c=3, **kwargs):
        raise AssertionError

    assert by_name(forward, (0, 1), {"c": 4, "d": 5}) == {"self": 0, "a": 1, "c": 4, "d": 5}
    assert by_name(forward, (0,), {}) == {"self": 0}
