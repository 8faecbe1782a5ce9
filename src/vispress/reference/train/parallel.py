"""Data parallel training on one machine: on a shared CPU, single threads beat one thread pool.

A pool waits at every operation for its slowest thread; processes meet only once a step.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank_and_world() -> tuple[int, int]:
    """Count processes: this one's number and how many; (0, 1) without `torch.distributed`."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main() -> bool:
    """Tell whether this process logs, saves and evaluates."""
    return rank_and_world()[0] == 0


@torch.no_grad()
def average_gradients(params: list[nn.Parameter], seconds: float) -> float:
    """Replace gradients by their mean over processes.

    Args:
        params: The same, in the same order, in every process.
        seconds: Training time as this process measured it.

    Returns:
        The main process's `seconds`, so that all agree on when to end.
    """
    rank, world = rank_and_world()
    if world == 1:
        return seconds
    grads = [p.grad for p in params if p.grad is not None]
    clock = torch.tensor([seconds * world if rank == 0 else 0.0], device=grads[0].device)
    flat = torch.cat([g.flatten() for g in grads] + [clock])
    dist.all_reduce(flat)
    flat /= world
    parts: list[Tensor] = list(torch.split(flat[:-1], [g.numel() for g in grads]))
    torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])
    return float(flat[-1])


def shared(stacks: list[Tensor], work: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Apply a function to the rows of some stacks, the rows dealt out over the processes.

    Args:
        stacks: The same in every process; the first axis is dealt out.
        work: Maps any number of rows (S, ...) to as many of the same shape.

    Returns:
        The results for all rows, in every process.
    """
    rank, world = rank_and_world()
    if world == 1:
        return [work(stack) for stack in stacks]
    flat = torch.zeros(sum(s.numel() for s in stacks), device=stacks[0].device)
    results = [
        part.view_as(stack)
        for part, stack in zip(torch.split(flat, [s.numel() for s in stacks]), stacks, strict=True)
    ]
    for stack, result in zip(stacks, results, strict=True):
        # a stack of one row belongs to the last process, as the first has other work
        mine = slice(world - 1 - rank, None, world)
        if stack[mine].numel():
            result[mine] = work(stack[mine])
    dist.all_reduce(flat)
    return results
