"""Small tensors reach a device, and one that is there is not copied."""

import torch

from vispress.devices import sent


def test_a_tensor_that_is_there_is_itself() -> None:
    here = torch.arange(3)
    assert sent(here, torch.device("cpu")) is here


def test_a_tensor_reaches_its_device() -> None:
    there = sent(torch.arange(3), torch.device("meta"))
    assert (there.device.type, there.shape, there.dtype) == ("meta", (3,), torch.int64)
