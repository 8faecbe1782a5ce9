"""Three-axis positions (M-RoPE) of kept tokens: each row brings its own from the encoder.

vLLM lays out positions when a request comes, before the encoder has run, and what is kept is known
behind it. Those of text are final then, as if nothing were dropped. Visual rows are laid out at the
start of their picture, and what they lie beyond it rides beside their features, through whatever
caches there are, until the LLM's forward adds it.
"""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor

from vispress.adapters.base import Modality, ModelAdapter

_BASE, _DIGITS, _AXES = 128, 3, 3  # half types hold such digits exactly
RIDING: Final = _DIGITS * _AXES
"""Columns beside the features."""
Positions = tuple[Tensor, int]
Rule = Callable[[list[int], list[Any]], Positions]
"""vLLM's: token ids and features of a prompt to positions `[3, L]` and what decoding adds."""
Run = Callable[[Modality, Mapping[str, Any]], list[int]]
"""Token ids that stand for a whole image or video, from its modality and vLLM's data of it."""


def written(places: Tensor, like: Tensor) -> Tensor:
    """Write `[3, K]` places below 128 ** 3 as `[K, 9]` digits, in any floating type."""
    digits = [places // _BASE**power % _BASE for power in range(_DIGITS)]
    return torch.cat(digits).T.to(like)


def read(digits: Tensor) -> Tensor:
    """Read `[K, 9]` digits as `[3, K]` places."""
    parts = digits.T.long().unflatten(0, (_DIGITS, _AXES))  # type: ignore[no-untyped-call]
    found: Tensor = sum(part * _BASE**power for power, part in enumerate(parts))
    return found


def data_of(modality: Modality, call: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Find vLLM's data of one image or video that says how it is laid out.

    Args:
        modality: Image or video.
        call: Arguments of the encoder call that it is in.
        number: Its place there.
    """
    names = (f"{modality}_grid_thw", "second_per_grid_ts", "timestamps")
    own = {name: call[name][number] for name in names if call.get(name) is not None}
    return {
        name: SimpleNamespace(data=value.cpu() if isinstance(value, Tensor) else value)
        for name, value in own.items()
    }


def inside(rule: Rule, run: Run, modality: Modality, data: Mapping[str, Any]) -> Tensor:
    """Lay out one image or video alone: `[3, N]`, from 0.

    Args:
        rule: vLLM's.
        run: What stands for it.
        modality: Image or video.
        data: vLLM's, of it.
    """
    ids = run(modality, data)
    return rule(ids, [_feature(modality, data, 0, len(ids))])[0]


def laid_out(rule: Rule, run: Run, ids: Sequence[int], features: Any) -> Positions:
    """Lay out a short prompt as if it were whole, visual rows at the start of their picture.

    Args:
        rule: vLLM's, for whole prompts.
        run: What stands for an image or video there.
        ids: The short prompt.
        features: vLLM's, with places in the short prompt.
    """
    whole: list[int] = []
    shifted, spans, at = [], [], 0
    for one in sorted(features, key=lambda each: each.mm_position.offset):
        start, length = one.mm_position.offset, one.mm_position.length
        own = run(one.modality, one.data)
        whole += ids[at:start]
        spans.append((len(whole), start, length))
        shifted.append(_feature(one.modality, one.data, len(whole), len(own)))
        whole += own
        at = start + length
    whole += ids[at:]
    positions, delta = rule(whole, shifted)
    parts, last, end = [], 0, 0
    for (first, start, length), feature in zip(spans, shifted, strict=True):
        parts += [positions[:, last:first], positions[:, [first]].expand(-1, length)]
        last, end = first + feature.mm_position.length, start + length
    assert len(ids) - end == positions.shape[1] - last
    return torch.cat([*parts, positions[:, last:]], dim=1), delta + len(whole) - len(ids)


def tokens_alone(adapter: ModelAdapter, modality: Modality, data: Mapping[str, Any]) -> list[int]:
    """List the ids of an image or video that stands in one run of placeholders."""
    t, h, w = frames(adapter, modality, data)
    return [adapter.placeholders()[modality]] * (t * h * w)


def frames(
    adapter: ModelAdapter, modality: Modality, data: Mapping[str, Any]
) -> tuple[int, int, int]:
    """Find the grid of an image's or video's tokens."""
    name = f"{modality}_grid_thw"
    grids = adapter.picture_grids(modality, {name: data[name].data[None]})
    assert grids is not None
    return grids[0]


def _feature(modality: Modality, data: Any, offset: int, length: int) -> Any:
    place = SimpleNamespace(offset=offset, length=length)
    return SimpleNamespace(modality=modality, data=data, mm_position=place)
