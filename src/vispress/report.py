"""What a compressed prefill kept, and what that cost: plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from vispress.report_html import ReportPictures, as_html, over


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

    def _repr_html_(self) -> str:
        """Show a table and rasters in a notebook."""
        return as_html(self)

    def over(self, pictures: Sequence[Any]) -> ReportPictures:
        """Show what was kept over the pictures, in a notebook.

        Args:
            pictures: PIL images, one for each image of the report, in the order of the prompts.

        Raises:
            ConfigError: They are not as many.
        """
        return over(self, pictures)
