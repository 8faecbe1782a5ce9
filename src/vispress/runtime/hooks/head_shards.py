"""Complete what is read of attention where each process has some of the heads.

Tensor parallelism deals the heads of a layer out to processes. What methods read of attention runs
over all heads, and all processes must keep the same tokens: so the rows that are read are gathered,
and means and sums are reduced. They are small against what the layer itself sends.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class HeadShards:
    """The processes that share the heads of the language model, in the order of heads.

    Args:
        group: Process group.
        size: Processes.
        rank: Place of this one.
    """

    group: Any
    size: int
    rank: int

    def __deepcopy__(self, memo: Any) -> "HeadShards":
        """Stay: a copy of a model talks to the same processes, and a group cannot be copied."""
        return self

    def gather(self, x: Tensor, axis: int) -> Tensor:
        """Join what all processes have along an axis of heads."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x, group=self.group)
        return torch.cat(parts, dim=axis)

    def mean(self, x: Tensor) -> Tensor:
        """Average means over the heads of each process."""
        return self.sum(x) / self.size

    def sum(self, x: Tensor) -> Tensor:
        """Add up sums over the heads of each process."""
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=self.group)
        return x

    def own(self, x: Tensor, axis: int) -> Tensor:
        """Take the part of this process along an axis of all heads."""
        return x.chunk(self.size, dim=axis)[self.rank]


def find_shards(model: nn.Module, attention: nn.Module) -> HeadShards | None:
    """Find the processes that share an attention's heads; None where each has all of them.

    FSDP deals weights out as well, but brings them together before they are used.

    Args:
        model: As the user has it, wrapped or not.
        attention: One of its attention modules.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    mesh = _mesh_of_weights(model, attention) or _mesh_of_loading(model, attention)
    if mesh is None:
        return None
    return HeadShards(mesh.get_group(), mesh.size(), mesh.get_local_rank())


def _mesh_of_weights(model: nn.Module, attention: nn.Module) -> Any:
    """The dimension of a device mesh along which weights are cut by rows (their outputs)."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    gathered = any(isinstance(module, FSDPModule) for module in model.modules())
    for weight in attention.parameters():
        if not isinstance(weight, DTensor):
            continue
        mesh, names = weight.device_mesh, weight.device_mesh.mesh_dim_names or ()
        cut = [n for n, p in enumerate(weight.placements) if p.is_shard() and mesh.size(n) > 1]
        if "tp" in names:
            cut = [n for n in cut if names[n] == "tp"]
        elif gathered:
            cut = []
        if cut:
            return mesh if mesh.ndim == 1 else mesh[names[cut[-1]]]
    return None


def _mesh_of_loading(model: nn.Module, attention: nn.Module) -> Any:
    """The mesh that older transformers cut plain weights for, noted beside them."""
    config: Any = attention.config
    query = getattr(attention, "q_proj", None)
    width = getattr(attention, "head_dim", None)
    if query is None or width is None or not isinstance(query, nn.Linear):
        return None
    if query.weight.shape[0] >= config.num_attention_heads * width:
        return None
    for module in model.modules():
        mesh = getattr(module, "_device_mesh", None)
        if mesh is not None and (getattr(module, "_tp_size", None) or 1) > 1:
            return mesh if mesh.ndim == 1 else mesh["tp"]
    return None
