"""Make a report of what a prefill recorded."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vispress.flops import CONVENTIONS, flops
from vispress.report import (
    CompressionReport,
    EncoderReport,
    Flops,
    ImageReport,
    PlacementReport,
    SampleReport,
)

if TYPE_CHECKING:
    from vispress.runtime.forward.prefill_record import PrefillRecord
    from vispress.runtime.forward.turns import Turn
    from vispress.runtime.tokens.images import Image


def build_report(last: "Turn", record: "PrefillRecord") -> CompressionReport:
    """Make data of a prefill and the last turn since (copies small tensors to the host)."""
    layers = len(record.layer_alive)
    batch = record.layer_alive[0].shape[0]
    samples: list[list[ImageReport]] = [[] for _ in range(batch)]
    for image in record.images:
        placements = []
        for trace in image.trace:
            step = record.placements[trace.step]
            kept = tuple(trace.index.tolist())
            at, name = step.placement, step.method.name
            placements.append(
                PlacementReport(name, at.stage.value, at.layer, len(kept), kept, at.until)
            )
        shown = range(image.num_visual) if image.shown is None else image.shown.tolist()
        stays = (p.kept for p in reversed(placements) if p.until in (None, layers))
        left = next(stays, shown)
        positions = tuple((image.positions + record.past).tolist())
        samples[image.sample].append(
            ImageReport(
                image.modality, image.num_visual, len(left), tuple(left), positions, image.grid,
                tuple(placements), _encoder(record, image),
            )
        )  # fmt: skip
    per_layer = _visual_per_layer(record, batch)
    totals = [sum(i.num_visual for i in images) for images in samples]
    size = record.width, record.mlp_width
    costs = {
        name: Flops(
            sum(
                flops(
                    [counts[b] for counts in per_layer], *size, name, mlp_shares=record.mlp_shares
                )
                for b in range(batch)
            ),
            sum(flops([n] * layers, *size, name) for n in totals),
        )
        for name in CONVENTIONS
    }
    return CompressionReport(
        samples=tuple(SampleReport(tuple(images)) for images in samples),
        num_layers=layers,
        kv_bytes=last.kv_bytes,
        flops=costs,
        visual_per_layer=per_layer,
        notes=(
            *record.notes,
            *record.idle(),
            *(remark for remarks in record.remarks for remark in remarks()),
        ),
        _alive=tuple(_grown(alive, last) for alive in record.layer_alive),
        _cached={layer: _grown(held.tokens, last) for layer, held in record.layer_cached.items()},
        turn=last.shown,
        turns=last.number,
        length=last.length,
    )


def _grown(alive: Tensor, last: "Turn") -> Tensor:
    """`[B, ..., L]` of a prefill, at the length of the last turn: what came since lives."""
    more = last.length - alive.shape[-1]
    if more <= 0:  # a cache that was cropped may hold less
        return alive[..., : last.length]
    if last.rows != len(alive):
        return alive
    later = alive.new_ones(*alive.shape[:-1], more)
    if last.mask is not None:
        real = last.mask[:, -more:].to(alive.device)
        later &= real if alive.ndim == 2 else real[:, None]
    return torch.cat([alive, later], dim=-1)


def _encoder(record: "PrefillRecord", image: "Image") -> EncoderReport | None:
    """What the encoder call of an image merged of it."""
    if record.encoder is None:
        return None
    first, *per_layer = image.capture.encoder_tokens[image.number]
    return EncoderReport(record.encoder, first, per_layer[-1], tuple(per_layer))


def _visual_per_layer(record: "PrefillRecord", batch: int) -> tuple[tuple[int, ...], ...]:
    """Counts of this prefill's visual tokens that are alive in each layer."""
    visual = torch.zeros(batch, record.layer_alive[0].shape[1], dtype=torch.bool)
    for image in record.images:
        visual[image.sample, image.positions + record.past] = True
    seen: dict[int, tuple[int, ...]] = {}
    out: list[tuple[int, ...]] = []
    for alive in record.layer_alive:
        if id(alive) not in seen:
            seen[id(alive)] = tuple((alive.cpu() & visual).sum(1).tolist())
        out.append(seen[id(alive)])
    return tuple(out)
