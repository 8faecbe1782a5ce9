"""An exact count of the bytes that tensors hold at their peak, without a device to ask."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts bytes of live storages that were made inside the block.

    Args:
        older: Tensors from before, of which views may be taken inside.
    """

    def __init__(self, *older: Tensor) -> None:
        super().__init__()
        self.older = {tensor.untyped_storage().data_ptr() for tensor in older}
        self.live: dict[int, tuple[int, int]] = {}  # storage -> (bytes, tensors that show it)
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._saw(tensor)
        self.peak = max(self.peak, self.now)
        return out

    def _saw(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self.older:
            return
        size, users = self.live.get(key, (storage.nbytes(), 0))
        if users == 0:
            self.now += size
        self.live[key] = (size, users + 1)
        weakref.finalize(tensor, self._gone, key)

    def _gone(self, key: int) -> None:
        size, users = self.live[key]
        if users == 1:
            self.now -= size
            del self.live[key]
        else:
            self.live[key] = (size, users - 1)


def extra_bytes(call: Callable[[], Any], *inputs: Tensor) -> int:
    """Peak bytes that a call holds beside its inputs, its outputs among them."""
    if inputs and inputs[0].is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory(*inputs) as memory:
        call()
    return memory.peak
