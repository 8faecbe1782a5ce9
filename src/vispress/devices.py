"""Small tensors on their way from the host to a device."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; a copy from the host to CUDA does not wait for the work there.

    CUDA stages a copy of pageable memory before it returns, so the host's tensor may change or go.
    """
    upload = tensor.device.type == "cpu" and device.type == "cuda"
    return tensor.to(device, non_blocking=upload)
