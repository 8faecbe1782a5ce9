"""Watch a run of operations: what follows from values, and what of it the host reads.

Values are pictures, texts and weights. What follows from a layout alone (which positions are
visual tokens, padding, sizes) is the same in every call that has it, so the host may read it: it is
answered from memory when the run is recorded, when no host may wait. What the host reads of values
decides which operations come next, and such a run is no fixed sequence.
"""

import sys
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, Final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from vispress.runtime.graphs.operations import (
    COMPARES,
    INDEXING,
    MOVES,
    SIZED_BY_VALUES,
    UNWRITTEN,
    aten,
    crosses,
    draws,
    indexed,
    places_of,
    read_of,
    written_by,
)

_READERS: Final = {
    Tensor.tolist,
    Tensor.numpy,
    Tensor.cpu,
    Tensor.__array__,
}
"""What reads a tensor that is on the host already: no operation is seen then."""
_MAKERS: Final = {torch.tensor, torch.as_tensor}
"""What copies numbers to a device: no operation is seen then."""


class NotFixedError(Exception):
    """A run is no fixed sequence of operations."""


class Kind(IntEnum):
    """What a tensor follows from."""

    LAYOUT = 0
    IDS = 1
    VALUES = 2


class Watch(TorchDispatchMode):
    """Record what a run does, and let another answer what the host reads.

    Args:
        values: Tensors that differ from call to call, weights among them.
        ids: Token ids: which of them are `special` belongs to the layout, the rest to the values.
        special: Ids that stand for visual tokens, or for where they begin and end.
        answers: What a first run had read, of which this one is told; None for a first run.
        strict: Whether to end the run where the host reads values.
    """

    def __init__(
        self,
        values: Iterable[Tensor],
        ids: Iterable[Tensor] = (),
        special: Iterable[int] = (),
        *,
        answers: "Watch | None" = None,
        strict: bool = True,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._special, self._strict = frozenset(special), strict
        self._kinds: dict[int, tuple[StorageWeakRef, Kind]] = {}
        for kind, tensors in ((Kind.VALUES, values), (Kind.IDS, ids)):
            for tensor in tensors:
                self._set(tensor, kind)
        self._answers = answers
        self._calls = _HostCalls(self)
        self.read: list[tuple[str, Any]] = []
        """What the host read that follows from the layout alone, in order."""
        self.refused: list[str] = []
        """What it read of values, and where."""
        self.log: list[tuple[str, tuple[tuple[int, ...], ...]]] = []
        """Operations, and the shapes of what they gave."""
        self.outside: list[Tensor] = []
        """Tensors that a second run has used and not made: who runs it again must hold them."""
        self._next, self._inside = 0, set[int]()

    def __enter__(self) -> "Watch":
        super().__enter__()  # type: ignore[no-untyped-call]
        self._calls.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._calls.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._answers is not None:
            return self._answered(func, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        kind = max(map(self.kind, tensors), default=Kind.LAYOUT)
        if func in INDEXING and (read := read_of(args)):
            self._refuse(func, max(map(self.kind, read)))
            args = indexed(args, lambda one: self._keep(str(func), places_of(one, args[0])))
        elif func in SIZED_BY_VALUES or crosses(func, tensors, kwargs):
            self._refuse(func, kind)
        elif draws(func) and not _by_seed(kwargs.get("generator")):
            self._refuse(func, Kind.VALUES)
        out = func(*args, **kwargs)
        if func in SIZED_BY_VALUES or crosses(func, tensors, kwargs):
            out = self._keep(str(func), out)
        self._mark(func, args, tensors, out, kind)
        return out

    def kind(self, tensor: Tensor) -> Kind:
        """Tell what a tensor follows from."""
        found = self._kinds.get(tensor.untyped_storage()._cdata)
        return Kind.LAYOUT if found is None else found[1]

    def _set(self, tensor: Tensor, kind: Kind) -> None:
        storage = tensor.untyped_storage()
        # the weak reference keeps the address from being another's
        self._kinds[storage._cdata] = StorageWeakRef(storage), max(kind, self.kind(tensor))  # type: ignore[no-untyped-call]

    def _mark(
        self, func: Any, args: Sequence[Any], tensors: Sequence[Tensor], out: Any, kind: Kind
    ) -> None:
        """Note an operation, and what its results follow from."""
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.log.append((str(func), tuple(tuple(tensor.shape) for tensor in made)))
        if kind == Kind.IDS and not (func in MOVES or func.is_view):
            kind = Kind.LAYOUT if self._asks_special(func, args) else Kind.VALUES
        fresh = bool(made) and (not tensors or func in UNWRITTEN)
        if fresh and made[0].device.type != "cpu" and _in_kernels():
            kind = Kind.VALUES  # it will be written on, unseen
        if kind > Kind.LAYOUT:
            written = [args[at] for at in written_by(func) if at < len(args)]
            for tensor in [*made, *tree_leaves(written)]:
                if isinstance(tensor, Tensor):
                    self._set(tensor, kind)

    def _asks_special(self, func: Any, args: Sequence[Any]) -> bool:
        """Whether ids are compared with one that belongs to the layout."""
        if func not in COMPARES:
            return False
        other = args[1]
        if isinstance(other, Tensor):
            return (
                other.numel() == 1
                and self.kind(other) == Kind.LAYOUT
                and (int(other) in self._special)
            )
        return other in self._special

    def _refuse(self, func: Any, kind: Kind) -> None:
        """Note a read of values."""
        if kind > Kind.LAYOUT and not (kind == Kind.IDS and func in MOVES):
            self.refused.append(f"{func} at {_asker()}")
            if self._strict:
                raise NotFixedError(f"the host reads values: {self.refused[-1]}")

    def _keep(self, name: str, value: Any) -> Any:
        """Keep what a first run read."""
        self.read.append((name, tree_map_only(Tensor, torch.clone, value)))
        return value

    def _recall(self, name: str) -> Any:
        """Give what the first run had read here; copies, which may be written on."""
        assert self._answers is not None
        read = self._answers.read
        if self._next >= len(read) or read[self._next][0] != name:
            raise NotFixedError(f"the host reads something else in a second run: {name}")
        self._next += 1
        return tree_map_only(Tensor, torch.clone, read[self._next - 1][1])

    def _answered(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation; what the host must know of it is known."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            if (storage := tensor.untyped_storage()._cdata) not in self._inside:
                self._inside.add(storage)
                self.outside.append(tensor)
        out = self._run(func, args, kwargs, tensors)
        made = (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        self._inside.update(tensor.untyped_storage()._cdata for tensor in made)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        if func in INDEXING:
            return func(*indexed(args, lambda one: self._recall(str(func))), **kwargs)
        if func in SIZED_BY_VALUES:
            return self._recall(str(func))
        if crosses(func, tensors, kwargs):
            held = self._recall(str(func))
            return args[0].copy_(held) if func is aten.copy_.default else held
        return func(*args, **kwargs)

    def reads(self, func: Any, tensor: Tensor) -> None:
        """Note a read that shows no operation."""
        if self._answers is None:
            kind = self.kind(tensor)
            if kind > Kind.IDS or (kind == Kind.IDS and func is Tensor.tolist):
                self._refuse(func.__name__, kind)


class _HostCalls(TorchFunctionMode):
    """Shows a `Watch` the calls that it cannot see as operations."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _READERS:
            self._watch.reads(func, args[0])
        if func in _MAKERS and not isinstance(args[0], Tensor):
            device = kwargs.pop("device", None) or torch.get_default_device()
            return self._made(func, args[0], args[1:], kwargs, device)
        if func is Tensor.new_tensor and not isinstance(args[1], Tensor):
            kwargs = {"dtype": args[0].dtype} | kwargs
            device = kwargs.pop("device", args[0].device)
            return self._made(torch.tensor, args[1], args[2:], kwargs, device)
        return func(*args, **kwargs)

    def _made(self, func: Any, data: Any, args: Any, kwargs: Any, device: Any) -> Tensor:
        """Make a tensor of numbers on the host; a copy, even there, is an operation of its own."""
        made: Tensor = func(
            tree_map_only(Tensor, self._numbers, data), *args, **kwargs, device="cpu"
        )
        return made.to(device, copy=True)  # it may be written on

    def _numbers(self, tensor: Tensor) -> Any:
        self._watch.reads(Tensor.tolist, tensor)
        return tensor.tolist()


def _by_seed(generator: Any) -> bool:
    """Whether a generator is one of the host, which a method seeds for itself."""
    return generator is not None and generator.device.type == "cpu"


def _in_kernels() -> bool:
    """Whether a kernel of our own is about to be launched."""
    frame = sys._getframe(2)
    while frame is not None:
        if "/vispress_kernels/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _asker() -> str:
    """File and line of vispress or of the model that asks, from the inside out."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        for package in ("vispress", "vispress_kernels", "transformers"):
            here = f"/{package}/" in name and not name.endswith(__file__[-20:])
            if here:
                return f"{package}/{name.rsplit(f'/{package}/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "the caller"
