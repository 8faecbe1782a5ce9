"""The gated delta rule in the precision of its inputs, token by token.

transformers computes it in fp32 by chunks of 64, whose bounds move with padding: two runs of one
model differ by 1e-3 of logits of scale 20, which would hide all that laws look for. In tests the
rule below stands in its place in models with fp64 weights.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

NAMES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """`S = exp(g) S; S += beta k (v - k S)`, read by `q S / sqrt(D)`, for `[B, L, H, D]` each."""
    groups = value.shape[2] // key.shape[2]
    query, key = (x.repeat_interleave(groups, dim=2) for x in (query, key))
    if use_qk_l2norm_in_kernel:
        query, key = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (query, key))
    query, decay = query * query.shape[-1] ** -0.5, g.to(value.dtype).exp()
    shape = (*value.shape[:1], *value.shape[2:3], key.shape[-1], value.shape[-1])
    state = value.new_zeros(shape) if initial_state is None else initial_state
    found = []
    for at in range(value.shape[1]):
        k, v = key[:, at, :, :, None], value[:, at, :, None]
        state = state * decay[:, at, :, None, None]
        state = state + k * (v - (k * state).sum(-2, keepdim=True)) * beta[:, at, :, None, None]
        found.append((query[:, at, :, :, None] * state).sum(-2))
    return torch.stack(found, dim=1), state if output_final_state else None


def put_in(family: str) -> None:
    """Let models of a family compute the rule so, in fp64; others keep transformers' own."""
    modeling: Any = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    for name in NAMES:
        original = getattr(modeling, name)
        if not hasattr(original, "of_transformers"):
            setattr(modeling, name, _by_dtype(original))


def _by_dtype(original: Any) -> Any:
    def rule(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = gated_delta_rule if query.dtype == torch.float64 else original
        return run(query, *args, **kwargs)

    rule.of_transformers = original  # type: ignore[attr-defined]
    return rule
