"""Muon on stacks of equal matrices and AdamW on the rest, as one optimiser.

Muon: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. Differs from
`torch.optim.Muon` only in that equally shaped matrices are orthogonalised in one batched product.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

from vispress.reference.train.parallel import shared

_STEPS: Final = 5
_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)


def orthogonalise(stack: Tensor) -> Tensor:
    """Find the nearest orthogonal matrices by Newton-Schulz iteration in bf16.

    Args:
        stack: Shape (S, R, C).

    Returns:
        Same shape, fp32, singular values about 1.
    """
    a, b, c = _COEFFICIENTS
    x = stack.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = (x.mT if tall else x).float()
    return out


class MuonAdamW(torch.optim.Optimizer):
    """Muon for matrices, AdamW for everything else, one learning-rate scale.

    Args:
        groups: Parameter groups; each has `params` and `muon` (bool), and optionally `lr_scale`.
        lr: Learning rate of both halves (Muon's update is rescaled to the RMS of AdamW's).
        weight_decay: Decoupled, matrices only.
        momentum: Muon's Nesterov momentum.
        betas: AdamW's.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.05,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
    ) -> None:
        super().__init__(
            list(groups),
            {
                "lr": lr,
                "lr_scale": 1.0,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "betas": betas,
                "muon": False,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            rate = group["lr"] * group["lr_scale"]
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if group["muon"]:
                self._muon(params, rate, group)
            else:
                self._adamw(params, rate, group)

    def _muon(self, params: list[nn.Parameter], rate: float, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
        stacks = []
        for same in by_shape.values():
            grads: list[Tensor] = [p.grad for p in same if p.grad is not None]
            buffers = []
            for p in same:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                buffers.append(state["momentum"])
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            stacks.append(torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"])))
        for same, directions in zip(by_shape.values(), shared(stacks, orthogonalise), strict=True):
            # 0.2 * sqrt(max side) matches AdamW's usual update RMS
            scale = 0.2 * max(same[0].shape) ** 0.5
            weights: list[Tensor] = list(same)
            torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
            torch._foreach_add_(weights, list(directions.unbind()), alpha=-rate * scale)

    def _adamw(self, params: list[nn.Parameter], rate: float, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for p in params:
            assert p.grad is not None
            state = self.state[p]
            if not state:
                state["mean"] = torch.zeros_like(p)
                state["square"] = torch.zeros_like(p)
                state["count"] = torch.zeros(())
            state["count"] += 1
            count = float(state["count"])
            state["mean"].lerp_(p.grad, 1 - beta1)
            state["square"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            spread = (state["square"] / (1 - beta2**count)).sqrt_().add_(1e-8)
            p.addcdiv_(state["mean"], spread, value=-rate / (1 - beta1**count))


def make_optimizer(
    modules: dict[str, nn.Module], *, lr: float, scales: dict[str, float] | None = None
) -> MuonAdamW:
    """Split the parameters of some modules into Muon and AdamW groups.

    Embeddings, position tables, norms, biases and the patch convolution go to AdamW.

    Args:
        modules: Name to module; a parameter shared by two is taken once.
        lr: Learning rate at scale 1.
        scales: Factor on the learning rate by module name; 1 where missing.

    Returns:
        The optimiser; group order is fixed by the order of `modules`.
    """
    groups: list[dict[str, Any]] = []
    seen: set[int] = set()
    for name, module in modules.items():
        halves: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for key, p in module.named_parameters():
            if id(p) in seen or not p.requires_grad:
                continue
            seen.add(id(p))
            halves[p.ndim == 2 and "embed" not in key and "head" not in key].append(p)
        scale = (scales or {}).get(name, 1.0)
        groups += [{"params": h, "muon": m, "lr_scale": scale} for m, h in halves.items() if h]
    return MuonAdamW(groups, lr=lr)
