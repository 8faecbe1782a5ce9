"""The oracle of visual windows: masks of (visual row, visual token) pairs in the plain model.

Nothing of the library's runtime decides who sees whom: it is counted out here, pair by pair, from
where the tokens stand.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from tests.laws.oracle import language_model
from tests.laws.running import Spy
from torch import Tensor, nn

from vispress import compressed
from vispress.methods import DivPrune


class Sight(NamedTuple):
    """`[B, L, L]` bool: pairs of a row and a key that are hidden, and that are shown."""

    hidden: Tensor
    shown: Tensor


def places_of(model: Any, inputs: Mapping[str, Any]) -> dict[tuple[int, Any], list[Any]]:
    """By tokens and grid of an image: sub-image, row and column of each, as methods are told."""
    spy = Spy()
    with compressed(model, spy.watch(DivPrune(keep_ratio=0.5))), torch.no_grad():
        model(**inputs)
    found = {}
    for tokens, _ in spy.seen:
        if (crops := tokens.crops) is not None:
            parts = zip(crops.segment.tolist(), crops.row.tolist(), crops.col.tolist(), strict=True)
            found[tokens.num_original, tokens.grid] = list(parts)
        else:
            frames, height, width = tokens.grid
            found[tokens.num_original, tokens.grid] = [
                (t, r, c) for t in range(frames) for r in range(height) for c in range(width)
            ]
    return found


def sight_of(report: Any, places: Mapping[Any, Any], alive: Tensor, size: int, causal: bool) -> Any:
    """Count out who sees whom.

    Args:
        report: Where the images stand.
        places: Where their tokens stand.
        alive: `[B, L]` bool.
        size: Side of the window.
        causal: Whether nothing is seen that comes later.
    """
    B, L = alive.shape
    hidden, shown = torch.zeros(2, B, L, L, dtype=torch.bool)
    for b, sample in enumerate(report.samples):
        tokens = [
            (position, number, *place)
            for number, image in enumerate(sample.images)
            for position, place in zip(
                image.positions, places[image.num_visual, image.grid], strict=True
            )
            if bool(alive[b, position]) and place[0] >= 0
        ]
        for q, *picture, r, c in tokens:
            for k, *other, r2, c2 in tokens:
                near = picture == other and max(abs(r - r2), abs(c - c2)) <= (size - 1) / 2
                hidden[b, q, k] = not near
                shown[b, q, k] = near and not causal
    return Sight(hidden, shown)


@contextmanager
def seeing(model: Any, sight: Sight, layers: Sequence[int]) -> Iterator[None]:
    """Inside, some layers of a model without a cache attend so; its masks are set by other hooks.

    Args:
        model: Not compressed.
        sight: Of the first positions; later ones see and are seen as ever.
        layers: Decoder layers.
    """

    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        more = mask.shape[-1] - sight.hidden.shape[-1]
        hidden, shown = (nn.functional.pad(x, (0, more, 0, more))[:, None] for x in sight)
        if mask.dtype == torch.bool:
            mask = mask & ~hidden | shown
        else:
            own = mask.diagonal(dim1=-2, dim2=-1)[..., None, :]  # what is added to each key
            mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min).where(~shown, own)
        return args, kwargs | {"attention_mask": mask}

    stack = language_model(model).layers
    handles = [stack[i].self_attn.register_forward_pre_hook(hook, with_kwargs=True) for i in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
