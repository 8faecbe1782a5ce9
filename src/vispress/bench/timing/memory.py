"""Peak memory of a call, beyond what was there before."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(device: torch.device, call: Callable[[], Any]) -> int:
    """Measure the most bytes in use at once while `call` runs, less those in use before.

    On a GPU this is what its allocator handed out (`torch.cuda.max_memory_allocated`). Elsewhere
    it is the sum of all tensors alive, counted operation by operation: exact and the same every
    time, but without scratch space inside an operation.

    Args:
        device: Where the call works.
        call: Weights and inputs must exist before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    live = LiveBytes()
    with live:
        call()
    return live.peak


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, every new storage counts from the operation that made it until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        inputs = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        for x in _tensors(out):
            storage = x.untyped_storage()
            # views and in-place results share storage with what the operation was given
            if storage._cdata not in inputs and storage._cdata not in self._alive:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
