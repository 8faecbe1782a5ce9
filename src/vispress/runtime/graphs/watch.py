"""Watch a run of operations: what follows from values, and what of it the host reads.

Values are pictures, texts and weights. What follows from a layout alone (which positions are
visual tokens, padding, sizes) is the same in every call that has it, so the host may read it: it is
answered from memory when the run is recorded, when no host may wait. What the host reads of values
decides which operations come next, and such a run is no fixed sequence.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
_SIZED_BY_VALUES: Final = {
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}
"""Operations whose result, or its size, the host must know."""
_INDEXING: Final = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
_MOVES: Final = {
    aten._to_copy.default,
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.gather.default,
    aten.index.Tensor,
    aten.stack.default,
    aten.cat.default,
}
"""Operations behind which token ids are token ids."""
_COMPARES: Final = {aten.eq.Scalar, aten.ne.Scalar, aten.eq.Tensor, aten.ne.Tensor}
_DRAWS: Final = ("rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal_")
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
        self._next = 0

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
        if func in _INDEXING and _masks(args):
            self._refuse(func, max(map(self.kind, _masks(args))))
            args = self._keep(str(func), _with_places(args), of=1)
        elif func in _SIZED_BY_VALUES or _crosses(func, tensors, kwargs):
            self._refuse(func, kind)
        elif _draws(func) and kwargs.get("generator") is None:
            self._refuse(func, Kind.VALUES)
        out = func(*args, **kwargs)
        if func in _SIZED_BY_VALUES or _crosses(func, tensors, kwargs):
            out = self._keep(str(func), out)
        self._mark(func, args, out, kind)
        return out

    def kind(self, tensor: Tensor) -> Kind:
        """Tell what a tensor follows from."""
        found = self._kinds.get(tensor.untyped_storage()._cdata)
        return Kind.LAYOUT if found is None else found[1]

    def _set(self, tensor: Tensor, kind: Kind) -> None:
        storage = tensor.untyped_storage()
        # the weak reference keeps the address from being another's
        self._kinds[storage._cdata] = StorageWeakRef(storage), max(kind, self.kind(tensor))  # type: ignore[no-untyped-call]

    def _mark(self, func: Any, args: Sequence[Any], out: Any, kind: Kind) -> None:
        """Note an operation, and what its results follow from."""
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.log.append((str(func), tuple(tuple(tensor.shape) for tensor in made)))
        if kind == Kind.IDS and not (func in _MOVES or func.is_view):
            kind = Kind.LAYOUT if self._asks_special(func, args) else Kind.VALUES
        if func in _UNWRITTEN and made[0].device.type != "cpu":
            kind = Kind.VALUES  # kernels of our own write there, unseen
        if kind > Kind.LAYOUT:
            written = [args[at] for at in _written(func) if at < len(args)]
            for tensor in [*made, *tree_leaves(written)]:
                if isinstance(tensor, Tensor):
                    self._set(tensor, kind)

    def _asks_special(self, func: Any, args: Sequence[Any]) -> bool:
        """Whether ids are compared with one that belongs to the layout."""
        if func not in _COMPARES:
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
        if kind > Kind.LAYOUT and not (kind == Kind.IDS and func in _MOVES):
            self.refused.append(f"{func} at {_asker()}")
            if self._strict:
                raise NotFixedError(f"the host reads values: {self.refused[-1]}")

    def _keep(self, name: str, value: Any, of: int | None = None) -> Any:
        """Keep what a first run read; of arguments, that at one place."""
        kept = value if of is None else value[of]
        self.read.append((name, tree_map_only(Tensor, torch.clone, kept)))
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
        if func in _INDEXING and _masks(args):
            return func(args[0], self._recall(str(func)), *args[2:], **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in _SIZED_BY_VALUES:
            return self._recall(str(func))
        if _crosses(func, tensors, kwargs):
            held = self._recall(str(func))
            return args[0].copy_(held) if func is aten.copy_.default else held
        return func(*args, **kwargs)

    def called(self, func: Any, run: Callable[[], Any], args: Sequence[Any]) -> Any:
        """Answer a call that may show no operation."""
        if func in _MAKERS:
            if self._answers is not None:
                return self._recall("tensor")
            return self._keep("tensor", run())
        if self._answers is None:
            kind = self.kind(args[0])
            ids = kind == Kind.IDS and func is not Tensor.tolist
            if kind > Kind.LAYOUT and not ids:
                self._refuse(func.__name__, kind)
        return run()


class _HostCalls(TorchFunctionMode):
    """Shows a `Watch` the calls that it cannot see as operations."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READERS or func in _MAKERS:
            return self._watch.called(func, lambda: func(*args, **(kwargs or {})), args)
        return func(*args, **(kwargs or {}))


_UNWRITTEN: Final = {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default}


@cache
def _written(func: Any) -> tuple[int, ...]:
    """Places of the arguments that an operation writes on."""
    found = enumerate(func._schema.arguments)
    return tuple(at for at, one in found if one.alias_info is not None and one.alias_info.is_write)


@cache
def _draws(func: Any) -> bool:
    return func._schema.name.removeprefix("aten::") in _DRAWS


def _masks(args: Sequence[Any]) -> list[Tensor]:
    """Indices by masks, of which the host must know how many they choose."""
    given = (index for index in args[1] if index is not None)
    return [index for index in given if index.dtype in (torch.bool, torch.uint8)]


def _with_places(args: Sequence[Any]) -> list[Any]:
    """Arguments of an operation that indexes, with places for masks."""
    indices: list[Tensor | None] = []
    for index in args[1]:
        mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        indices += index.nonzero().unbind(1) if mask else [index]
    return [args[0], indices, *args[2:]]


def _crosses(func: Any, tensors: Sequence[Tensor], kwargs: Any) -> bool:
    """Whether an operation copies between the host and a device."""
    if func is aten.copy_.default:
        return tensors[0].device.type != tensors[1].device.type
    if func is aten._to_copy.default and (device := kwargs.get("device")) is not None:
        return torch.device(device).type != tensors[0].device.type
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
