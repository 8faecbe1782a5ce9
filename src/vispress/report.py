"""What a compressed prefill kept, and what that cost: plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vispress.flops import CONVENTIONS, flops

if TYPE_CHECKING:
    from vispress.runtime.forward.prefill_record import PrefillRecord
    from vispress.runtime.forward.turns import Turn
    from vispress.runtime.tokens.images import Image


@dataclass(frozen=True)
class PlacementReport:
    """What one placement kept of one image.

    Args:
        method: Name of the compressor.
        stage: `"pre_llm"` or `"in_llm"`.
        layer: Decoder layer before which rows were dropped.
        num_kept: Tokens of the image left after it.
        kept: Their indices in the image's own raster, ascending.
        until: Decoder layer where the others come back, which bypass the layers between; or None.
    """

    method: str
    stage: str
    layer: int
    num_kept: int
    kept: tuple[int, ...]
    until: int | None = None


@dataclass(frozen=True)
class EncoderReport:
    """What was merged or pooled of one image inside the vision encoder.

    A token is what becomes one visual token: a patch, or the patches that the model's merger joins;
    tokens of all crops, tiles or frames are counted, padding included, [CLS] is not.

    Args:
        method: Name of the compressor.
        num_tokens: Tokens that entered the encoder.
        num_left: Groups they were merged into behind its last layer.
        per_layer: Tokens that each layer handed on; its MLP computed as many, unless windows were
            pooled behind it.
    """

    method: str
    num_tokens: int
    num_left: int
    per_layer: tuple[int, ...]


@dataclass(frozen=True)
class ImageReport:
    """One image or video of a sample.

    Args:
        modality: `"image"` or `"video"`.
        num_visual: Visual tokens it had.
        num_kept: Visual tokens left at the last layer.
        kept: Their indices in the image's own raster, ascending.
        positions: Positions of all its tokens in the logical (padded) sequence.
        grid: `(t, h, w)` of the raster, or None for composed images.
        placements: What each placement before or in the LLM kept.
        encoder: What was merged in the vision encoder, if a method acts there. All places leave it,
            those of a group with the same value: what the LLM gets is for the placements to say.
    """

    modality: str
    num_visual: int
    num_kept: int
    kept: tuple[int, ...]
    positions: tuple[int, ...]
    grid: tuple[int, int, int] | None
    placements: tuple[PlacementReport, ...]
    encoder: EncoderReport | None = None


@dataclass(frozen=True)
class SampleReport:
    """One sample of the batch, with its images in the order of the prompt."""

    images: tuple[ImageReport, ...]


@dataclass(frozen=True)
class Flops:
    """Prefill FLOPs of visual tokens in one published convention, summed over samples."""

    compressed: float
    uncompressed: float

    @property
    def ratio(self) -> float:
        """Compressed over uncompressed (1.0 without visual tokens)."""
        return self.compressed / self.uncompressed if self.uncompressed else 1.0


@dataclass(frozen=True)
class CompressionReport:
    """The last prefill with visual tokens of a compressed model, and its conversation since.

    Args:
        samples: One entry a sample.
        num_layers: Decoder layers.
        kv_bytes: Bytes of keys and values in the cache after the last turn's prefill (0 without a
            cache).
        flops: By convention: `"mac3"`, `"flop3"`, `"fastv2"`.
        visual_per_layer: `[layer][sample]`, visual tokens of this prefill that enter each layer.
        notes: What was decided when the model was compressed (scaled layers, substitutes,
            positions), and what happened in this call: methods that left all as it was, say.
        turn: The turn whose prefill this is, from 1. A turn is a call of several tokens on the
            conversation's KV cache, or a `generate`.
        turns: Turns of the conversation by now; those behind `turn` brought text alone.
        length: Tokens of the conversation, padding included, at the end of the last turn's prefill:
            tokens decoded behind that count from the next turn on.
    """

    samples: tuple[SampleReport, ...]
    num_layers: int
    kv_bytes: int
    flops: Mapping[str, Flops]
    visual_per_layer: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]
    _alive: tuple[Tensor, ...] = field(repr=False, compare=False)
    _cached: Mapping[int, Tensor] = field(repr=False, compare=False, default_factory=dict)
    turn: int = 1
    turns: int = 1
    length: int = 0

    def alive(self, layer: int) -> Tensor:
        """`[B, L]` bool: positions of the full logical sequence that enter decoder layer `layer`.

        Padding counts as not alive; L is `length`: tokens that were in the cache before are in it
        (those that a sliding window had let go of by the prefill count as not alive), and those of
        later turns, all of which live. Only where the batch has changed since, L ends with the
        prefill.

        Raises:
            IndexError: There is no such layer.
        """
        if not 0 <= layer < self.num_layers:
            raise IndexError(f"layer must be in [0, {self.num_layers}), got {layer}")
        return self._alive[layer]

    def cached(self, layer: int) -> Tensor:
        """`[B, Hkv or 1, L]` bool: positions that each KV head of a layer's cache holds.

        As `alive`, but where a method evicts from the cache behind the prefill.

        Raises:
            IndexError: There is no such layer.
        """
        alive = self.alive(layer)
        return self._cached[layer] if layer in self._cached else alive[:, None]

    @property
    def mean_keep_ratio(self) -> float:
        """Visual tokens kept, as a mean over decoder layers (1.0 without visual tokens)."""
        total = sum(image.num_visual for sample in self.samples for image in sample.images)
        kept = sum(map(sum, self.visual_per_layer))
        return kept / (total * self.num_layers) if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries (without `alive`)."""
        return {
            "samples": [asdict(sample) for sample in self.samples],
            "num_layers": self.num_layers,
            "turn": self.turn,
            "turns": self.turns,
            "length": self.length,
            "kv_bytes": self.kv_bytes,
            "flops": {
                name: {"compressed": f.compressed, "uncompressed": f.uncompressed, "ratio": f.ratio}
                for name, f in self.flops.items()
            },
            "visual_per_layer": [list(counts) for counts in self.visual_per_layer],
            "mean_keep_ratio": self.mean_keep_ratio,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [
            f"{b}.{i} {image.modality}: {image.num_kept} of {image.num_visual} visual tokens ("
            + ", ".join(f"{p.method}@{p.layer}: {p.num_kept}" for p in image.placements)
            + ("" if (e := image.encoder) is None else f"; encoder {e.num_left} of {e.num_tokens}")
            + ")"
            for b, sample in enumerate(self.samples)
            for i, image in enumerate(sample.images)
        ]
        lines.append(
            f"mean over layers {self.mean_keep_ratio:.3f}, KV cache {self.kv_bytes / 2**20:.2f} "
            "MiB, "
            f"visual FLOPs x{self.flops['mac3'].ratio:.3f}"
        )
        if self.turns > 1:
            lines.append(f"turn {self.turn} of {self.turns}, {self.length} tokens in all")
        return "\n".join([*lines, *self.notes])


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
