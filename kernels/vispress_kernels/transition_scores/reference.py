"""What `transition_scores` means, in plain torch."""

import torch
from torch import Tensor

EPS = 1e-8


def transition_scores_reference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`|y| / |x|` and `cos(x, y)` over the last axis; norms below 1e-8 count as 1e-8."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_norm = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    y_norm = torch.linalg.vector_norm(y, dim=-1, dtype=dtype)
    dot = (x.to(dtype) * y.to(dtype)).sum(-1)
    return y_norm / x_norm.clamp(min=EPS), dot / x_norm.clamp(min=EPS) / y_norm.clamp(min=EPS)
