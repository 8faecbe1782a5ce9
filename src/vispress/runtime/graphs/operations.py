"""Tell operations apart by what the host must know of them, and what they do with token ids."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

aten = torch.ops.aten
SIZED_BY_VALUES: Final = {
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
INDEXING: Final = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
MOVES: Final = {
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
COMPARES: Final = {aten.eq.Scalar, aten.ne.Scalar, aten.eq.Tensor, aten.ne.Tensor}
_DRAWS: Final = ("rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal_")
UNWRITTEN: Final = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
"""Operations whose result holds nothing yet."""


@cache
def written_by(func: Any) -> tuple[int, ...]:
    """Places of the arguments that an operation writes on."""
    found = enumerate(func._schema.arguments)
    return tuple(at for at, one in found if one.alias_info is not None and one.alias_info.is_write)


@cache
def draws(func: Any) -> bool:
    return func._schema.name.removeprefix("aten::") in _DRAWS


def read_of(args: Sequence[Any]) -> list[Tensor]:
    """What the host must know of an operation that indexes, or send."""
    found = [one for one in args[1] if one is not None and _read(one, args[0])]
    written = [one for one in args[2:3] if isinstance(one, Tensor)]
    return found + [one for one in written if one.device.type != args[0].device.type]


def _read(index: Tensor, of: Tensor) -> bool:
    """Whether the host must know what an index chooses, or send it."""
    return index.dtype in (torch.bool, torch.uint8) or index.device.type != of.device.type


def places_of(index: Tensor, of: Tensor) -> tuple[Tensor, ...]:
    """An index as places, where the tensor is that it chooses of."""
    masks = index.ndim > 0 and index.dtype in (torch.bool, torch.uint8)
    return tuple(one.to(of.device) for one in (index.nonzero().unbind(1) if masks else [index]))


def indexed(args: Sequence[Any], places: Callable[[Tensor], Sequence[Tensor]]) -> list[Any]:
    """Arguments of an operation that indexes, with places for what the host must know."""
    of, indices = args[0], list[Tensor | None]()
    for index in args[1]:
        indices += [index] if index is None or not _read(index, of) else places(index)
    rest = list(args[2:])
    if rest and isinstance(rest[0], Tensor) and rest[0].device.type != of.device.type:
        (rest[0],) = places(rest[0])  # of one number, which may be of any kind
    return [of, indices, *rest]


def crosses(func: Any, tensors: Sequence[Tensor], kwargs: Any) -> bool:
    """Whether an operation copies between the host and a device."""
    if func is aten.copy_.default:
        return tensors[0].device.type != tensors[1].device.type
    if func is aten._to_copy.default and (device := kwargs.get("device")) is not None:
        return torch.device(device).type != tensors[0].device.type
    return False
