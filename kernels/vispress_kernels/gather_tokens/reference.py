"""What `gather_tokens` means, in plain torch."""

import torch
from torch import Tensor


def gather_tokens_reference(x: Tensor, keep: Tensor) -> Tensor:
    """`out[b, k] = x[b, keep[b, k]]`; differentiable."""
    # indexing keeps the order of strides
    return x[torch.arange(x.shape[0], device=x.device)[:, None], keep].contiguous()
