"""Qwen2-VL to Qwen3-VL-MoE: one packed encoder sequence, 2 x 2 merging, M-RoPE."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vispress.adapters.base import (
    Encode,
    EncoderBlock,
    Grid,
    Modality,
    ModelAdapter,
    register_adapter,
)
from vispress.adapters.towers import Layout
from vispress.adapters.two_layers import of_transformers, patch_norm, two_layer
from vispress.errors import UnsupportedModelError
from vispress.types import TwoLayer

MERGERS = (
    "PatchMerger",
    "Qwen2_5_VLPatchMerger",
    "Qwen3VLVisionPatchMerger",
    "Qwen2_5OmniPatchMerger",
    "Qwen3OmniMoeVisionPatchMerger",
    "Qwen3VLMoeVisionPatchMerger",
    "Qwen3_5VisionPatchMerger",
    "Qwen3_5MoeVisionPatchMerger",
)
"""Mergers of transformers: a norm of patches (or of all of a token's), and a two-layer MLP."""


@register_adapter("Qwen2VLModel")
class Qwen2VLAdapter(ModelAdapter):
    """`Qwen2VLModel`: patches come in groups that are merged, images and frames one after another.

    Token inputs of the merger are `[N, merge**2 * Dv]`: the concatenated patches of each token.
    """

    family = "qwen2_vl"
    packed = True
    mrope = True
    kinds = frozenset({"video"})

    _videos_apart: ClassVar[bool] = False
    """Whether frames of a video stand in runs of their own."""

    @property
    def _merge(self) -> int:
        """Patches along one edge of a token."""
        return int(self.base.visual.spatial_merge_size)

    def placeholders(self) -> Mapping[Modality, int]:
        """Image and video token ids."""
        config = self.base.config
        return {"image": config.image_token_id, "video": config.video_token_id}

    def encoder_attentions(self) -> Sequence[nn.Module]:
        """The vision blocks' attention modules."""
        return [block.attn for block in self.base.visual.blocks]

    def feature_layer(self) -> int:
        """The last block."""
        return len(self.base.visual.blocks) - 1

    def encoder_blocks(self) -> Sequence[EncoderBlock]:
        """All vision blocks."""
        return [EncoderBlock(x, x.attn, x.norm2, x.mlp) for x in self.base.visual.blocks]

    def patches_per_token(self) -> int:
        """Those that the merger joins; they stand together in the packed sequence."""
        return self._merge**2

    def sequences(
        self, modality: Modality, call: Mapping[str, Any], length: int
    ) -> Sequence[Sequence[int]]:
        """One a frame (or temporal patch)."""
        grids = _grid(modality, call).tolist()
        return [[h * w // self._merge**2] * t for t, h, w in grids]

    def encoder_grids(
        self, modality: Modality, call: Mapping[str, Any]
    ) -> Sequence[tuple[int, int]] | None:
        """One a frame; every size is taken."""
        if self._merge != 2:
            return None
        grids = _grid(modality, call).tolist() if call else ()
        return [(h // 2, w // 2) for t, h, w in grids for _ in range(t)]

    @property
    def projector(self) -> nn.Module:
        """The merger."""
        return self.base.visual.merger  # type: ignore[no-any-return]

    def two_layer(self) -> TwoLayer | None:
        """The weights of a plain merger, with its norm of each patch (or of a token's together)."""
        if not of_transformers(self.projector, MERGERS):
            return None
        norm, layers = self._merger_parts()
        normed = patch_norm(norm, layers[0])
        return None if normed is None else two_layer(self.projector, layers, normed)

    def _merger_parts(self) -> tuple[nn.Module, tuple[Any, Any, Any]]:
        """The norm of a known merger, and the layers of its MLP."""
        merger: Any = self.projector
        first, act, second = merger.mlp
        return merger.ln_q, (first, act, second)

    def project(self, projector: nn.Module, features: Tensor) -> Tensor:
        """Split token inputs `[..., N, merge**2 * Dv]` into patches again, and merge."""
        patches = features.reshape(-1, features.shape[-1] // self._merge**2)
        merged = projector(patches)
        return merged.view(*features.shape[:-1], -1)  # type: ignore[no-any-return]

    def projector_inputs(self, modality: Modality, raw: Tensor, call: Mapping[str, Any]) -> Tensor:
        """`[S, Dv]` patches as `[S / merge**2, merge**2 * Dv]` token inputs, in encoder order."""
        return raw.reshape(-1, self._merge**2 * raw.shape[-1])

    def pack(
        self, modality: Modality, values: Tensor, call: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """Mean over the patches of a token, in raster order; token rows are only put in order."""
        grid = _grid(modality, call)
        sizes = [t * h * w // self._merge**2 for t, h, w in grid.tolist()]
        values = values.reshape(-1, values.shape[-1])
        if len(values) == sum(sizes) * self._merge**2:
            values = values.reshape(-1, self._merge**2, values.shape[-1]).mean(1)
        elif len(values) != sum(sizes):
            raise UnsupportedModelError(
                f"{len(values)} encoder rows do not fit {sum(sizes)} visual tokens"
            )
        return torch.split(self._in_order(values, grid), sizes)

    def _in_order(self, values: Tensor, grid: Tensor) -> Tensor:
        """Token rows from encoder order to raster order."""
        return values

    def merged_images(
        self, modality: Modality, call: Mapping[str, Any], runs: Sequence[int], *, geometry: bool
    ) -> tuple[Sequence[int], Mapping[str, Any]]:
        """Count the tokens of each by its grid, or by runs, between which marks of vision stand."""
        name = f"{modality}_grid_thw"
        if call.get(name) is None and (geometry or (modality == "video" and self._videos_apart)):
            raise UnsupportedModelError(
                f"{self.family}: of {modality}s merged into inputs_embeds, rows and columns cannot "
                f"be told; pass {name} beside them"
            )
        if call.get(name) is None:  # shapes that nobody reads
            return runs, {name: torch.tensor([[1, self._merge, n * self._merge] for n in runs])}
        grids = call[name].tolist()
        return [t * h * w // self._merge**2 for t, h, w in grids], {name: call[name]}

    def layouts(
        self, modality: Modality, counts: Sequence[int], call: Mapping[str, Any]
    ) -> Sequence[Layout]:
        """The raster of merged tokens; frames (or temporal patches) are its first axis."""
        layouts: list[Layout] = []
        for count, (t, h, w) in zip(counts, _grid(modality, call).tolist(), strict=True):
            grid = (t, h // self._merge, w // self._merge)
            if grid[0] * grid[1] * grid[2] != count:
                raise UnsupportedModelError(f"{count} visual tokens do not fit the grid {grid}")
            layouts.append((grid, None))
        return layouts

    def picture_grids(self, modality: Modality, inputs: Mapping[str, Any]) -> Sequence[Grid]:
        """Take the raster of merged tokens; every picture and video keeps its own size."""
        if (grids := inputs.get(f"{modality}_grid_thw")) is None:
            return []
        return [(t, h // self._merge, w // self._merge) for t, h, w in grids.tolist()]

    def any_size(self) -> AbstractContextManager[None]:
        """Change nothing: the encoder takes every size."""
        return nullcontext()

    def resize(
        self, modality: Modality, inputs: Mapping[str, Any], grids: Sequence[Grid], encode: Encode
    ) -> Mapping[str, Any]:
        """Resize to whole tokens, which the processor then leaves as they are."""
        side = int(self.base.config.vision_config.patch_size) * self._merge
        sizes = [(rows * side, columns * side) for _, rows, columns in grids]
        pixels = [height * width for height, width in sizes]
        # the processor resizes what is outside of these bounds
        bounds = {"shortest_edge": min(pixels, default=1), "longest_edge": max(pixels, default=1)}
        return encode(sizes, {f"{modality}s_kwargs": {"size": bounds}})


@register_adapter("Qwen2_5_VLModel")
class Qwen25VLAdapter(Qwen2VLAdapter):
    """`Qwen2_5_VLModel`: most blocks attend in windows, and the encoder order is by windows."""

    family = "qwen2_5_vl"

    def feature_layer(self) -> int:
        """The last block with full attention."""
        return max(self.global_layers())

    def global_layers(self) -> Sequence[int]:
        """Blocks with full attention."""
        return sorted(self.base.visual.fullatt_block_indexes)

    def check(self) -> None:
        """At least one block with full attention, to compare tokens of different windows."""
        if not self.global_layers():
            raise UnsupportedModelError(
                "the vision encoder has no full-attention block (fullatt_block_indexes is empty)"
            )

    def sequences(
        self, modality: Modality, call: Mapping[str, Any], length: int
    ) -> Sequence[Sequence[int]]:
        """One a window, in all blocks: windows lie inside of frames."""
        windows = []
        for grid in _grid(modality, call):
            _, bounds = self._windows(grid[None])
            tokens = torch.as_tensor(bounds).cpu() // self._merge**2
            windows.append(tokens.diff().tolist())
        return windows

    def encoder_grids(
        self, modality: Modality, call: Mapping[str, Any]
    ) -> Sequence[tuple[int, int]] | None:
        """None: windows of attention would have to be laid anew."""
        return None

    def _in_order(self, values: Tensor, grid: Tensor) -> Tensor:
        index, _ = self._windows(grid)
        return values[torch.argsort(index).to(values.device)]

    def _windows(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Order of the tokens in the packed sequence, and where windows begin in patches."""
        from transformers.vision_utils import get_vision_window_index

        visual = self.base.visual
        order: tuple[Tensor, Tensor] = get_vision_window_index(
            grid,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
        return order


@register_adapter("Qwen3VLModel")
class Qwen3VLAdapter(Qwen2VLAdapter):
    """`Qwen3VLModel`: as Qwen2-VL, with DeepStack features (the runtime's affair).

    A video is one item of `t` frames; its placeholders come in one run a frame, with timestamps in
    the text between. Its `get_video_features` calls `get_image_features`, with the image names.
    """

    family = "qwen3_vl"
    _videos_apart = True

    def _merger_parts(self) -> tuple[nn.Module, tuple[Any, Any, Any]]:
        merger: Any = self.projector
        return merger.norm, (merger.linear_fc1, merger.act_fn, merger.linear_fc2)

    def encoder_taps(self) -> Sequence[nn.Module]:
        """The mergers of DeepStack."""
        return list(self.base.visual.deepstack_merger_list)


@register_adapter("Qwen3VLMoeModel")
class Qwen3VLMoeAdapter(Qwen3VLAdapter):
    """`Qwen3VLMoeModel`: Qwen3-VL with experts in the MLPs of the language model."""

    family = "qwen3_vl_moe"


def _grid(modality: Modality, call: Mapping[str, Any]) -> Tensor:
    """`[images, 3]`, in patches."""
    grid = call.get(f"{modality}_grid_thw")
    # Qwen3-VL hands videos to its image method
    return call["image_grid_thw"] if grid is None else grid  # type: ignore[no-any-return]
