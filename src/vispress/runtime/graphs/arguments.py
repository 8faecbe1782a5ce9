"""Sort the arguments of a forward: those that make its layout, and those that are values in it."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from vispress.runtime.kv_cache.hf_compat import CACHE, OLD

MASK: Final = "attention_mask"
POSITIONS: Final = "position_ids"
SEQUENCES: Final = ("input_ids", MASK, POSITIONS, "mm_token_type_ids", "cache_position")
"""Arguments that have a value for each token, along their last axis."""
_FLOATS: Final = ("second_per_grid_ts",)
"""Arguments of other numbers on which places of tokens rest."""
_SUFFIXES: Final = ("_token_id", "_token_index")


def special_ids(config: Any, more: Sequence[int] = ()) -> tuple[int, ...]:
    """List the token ids that stand for visual tokens, or for where they begin and end.

    Args:
        config: The base model's.
        more: Others that belong to a layout.
    """
    text = ("bos", "eos", "pad", "sep", "decoder_start")
    found = {
        value
        for name, value in vars(config).items()
        if name.endswith(_SUFFIXES) and isinstance(value, int) and not name.startswith(text)
    }
    return tuple(sorted(found | {*more}))


@dataclass(frozen=True, eq=False)
class Arguments:
    """Keyword arguments of one forward, sorted.

    Args:
        ids: `[B, Q]`, token ids.
        layout: Small tensors on which the layout rests (masks, positions, grids, sizes), by name.
        values: Tensors that are values alone, by name.
        plain: What is no tensor, by name.
        host: Copies of `ids` and `layout` on the host.
    """

    ids: Tensor
    layout: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    plain: Mapping[str, Any]
    host: Mapping[str, Tensor]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Arguments":
        """Sort them; what the host must know is copied in one go."""
        ids: Tensor = given["input_ids"]
        layout: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for name, value in given.items():
            if not isinstance(value, Tensor):
                if name not in (CACHE, OLD):
                    plain[name] = value
            elif name in _FLOATS or not (name == "input_ids" or value.is_floating_point()):
                layout[name] = value
            elif name != "input_ids":
                values[name] = value
        fetched = {"input_ids": ids, **layout}
        return cls(ids, layout, values, plain, _on_host(fetched))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        return {"input_ids": self.ids, **self.layout, **self.values}

    def lengthened(self, count: int, filler: int) -> "Arguments":
        """Give them with more text behind the last token of each row.

        Args:
            count: Tokens of it.
            filler: Their id.
        """
        if not count:
            return self
        longer = {
            name: _lengthened(name, one, count, filler)
            for name, one in self.tensors.items()
            if name in SEQUENCES
        }
        host = {
            name: _lengthened(name, one, count, filler) if name in SEQUENCES else one
            for name, one in self.host.items()
        }
        layout = {name: longer.get(name, one) for name, one in self.layout.items()}
        return Arguments(longer["input_ids"], layout, self.values, self.plain, host)

    def key(self, special: Sequence[int]) -> Hashable:
        """Give what calls of one layout share, and no others.

        Args:
            special: Token ids that belong to it.
        """
        host = self.host["input_ids"].numpy()
        return (
            tuple((host == token).tobytes() for token in special),
            tuple((name, self.host[name].numpy().tobytes()) for name in self.layout),
            tuple((name, one.shape, one.dtype, one.device) for name, one in self.tensors.items()),
            tuple((name, value) for name, value in self.plain.items()),
        )


def _lengthened(name: str, tensor: Tensor, count: int, filler: int) -> Tensor:
    """A tensor with a value for each token, and so many more."""
    if name in (POSITIONS, "cache_position"):  # they go on
        more = tensor[..., -1:] + torch.arange(1, count + 1, device=tensor.device).to(tensor)
    else:
        value = {"input_ids": filler, MASK: 1}.get(name, 0)
        more = tensor.new_full((*tensor.shape[:-1], count), value)
    return torch.cat([tensor, more], dim=-1)


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host: of tensors on a device by one wait, for all of them."""
    away = [one for one in tensors.values() if one.device.type != "cpu"]
    if not away:
        return {name: one.clone() for name, one in tensors.items()}
    flat = torch.cat([one.reshape(-1).double() for one in away]).cpu()
    parts = iter(torch.split(flat, [one.numel() for one in away]))
    return {
        name: one.clone() if one.device.type == "cpu" else next(parts).view(one.shape).to(one.dtype)
        for name, one in tensors.items()
    }


def kind_of(cache: Any) -> Hashable:
    """Give what graphs of one kind of cache share.

    Args:
        cache: A KV cache, or None.
    """
    if cache is None:
        return None
    layers = tuple(
        (type(layer), getattr(layer, "max_cache_len", None), getattr(layer, "sliding_window", None))
        for layer in cache.layers
    )
    return type(cache), layers


def weights(model: nn.Module) -> list[Tensor]:
    """List the parameters of a model, each once."""
    return list(model.parameters())
