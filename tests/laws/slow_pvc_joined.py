"""PVC written out where four patches make a token: InternVL, Qwen2-VL and Qwen3-VL."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tests.laws.slow_pvc import SlowPVC
from tests.tiny import QWEN
from torch import Tensor


def blocks(grid: Tensor) -> Tensor:
    """`[h, w, D]` as Qwen has it: the four patches of a token side by side."""
    h, w, width = grid.shape
    return grid.view(h // 2, 2, w // 2, 2, width).transpose(1, 2).reshape(h * w, width)


def raster(x: Tensor, h: int, w: int) -> Tensor:
    """The other way."""
    return x.view(h // 2, w // 2, 2, 2, -1).transpose(1, 2).reshape(h, w, -1)


class SlowJoined(SlowPVC):
    """A model without hooks whose encoder pools; its layers are its own, frame by frame."""

    def frames(self, inputs: Mapping[str, Any]) -> list[tuple[Tensor, list[Tensor]]]:
        """`[K, D]` of each frame or tile, and what DeepStack takes of it on the way."""
        return self.of_qwen(inputs) if self.family in QWEN else self.of_internvl(inputs)

    def of_internvl(self, inputs: Mapping[str, Any]) -> list[tuple[Tensor, list[Tensor]]]:
        base = self.model.model
        x = base.vision_tower.embeddings(inputs["pixel_values"])
        x = x[0] if isinstance(x, tuple) else x
        side, layers = round((x.shape[1] - 1) ** 0.5), base.vision_tower.encoder.layer
        for number, layer in enumerate(
            layers[: len(layers) + 1 + base.config.vision_feature_layer]
        ):
            x = layer(x)
            if number + 1 in self.after:
                grid = self.pooled(
                    x[:, 1:].unflatten(1, (side, side)), self.after.index(number + 1)
                )
                x, side = torch.cat([x[:, :1], grid.flatten(1, 2)], dim=1), side // 2
        grid = x[:, 1:].unflatten(1, (side, side))
        shuffled = base.pixel_shuffle(grid, scale_factor=0.5).flatten(1, 2)
        return [(own, []) for own in base.multi_modal_projector(shuffled)]

    def of_qwen(self, inputs: Mapping[str, Any]) -> list[tuple[Tensor, list[Tensor]]]:
        visual, first = self.model.model.visual, []
        hook = visual.blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: first.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        visual(inputs["pixel_values"], inputs["image_grid_thw"])
        hook.remove()
        found, start = [], 0
        for t, h, w in inputs["image_grid_thw"].tolist():
            for _ in range(t):
                found.append(self.frame(visual, first[0][start : start + h * w], h, w))
                start += h * w
        return found

    def frame(self, visual: Any, x: Tensor, h: int, w: int) -> tuple[Tensor, list[Tensor]]:
        taps, deep = list(getattr(visual, "deepstack_visual_indexes", ())), []
        for number, block in enumerate(visual.blocks):
            bounds = torch.tensor([0, h * w], dtype=torch.int32)
            x = block(x, cu_seqlens=bounds, position_embeddings=self.rotation(visual, h, w))
            if number + 1 in self.after:
                grid = self.pooled(raster(x, h, w)[None], self.after.index(number + 1))[0]
                x, h, w = blocks(grid), h // 2, w // 2
            if number in taps:
                deep.append(visual.deepstack_merger_list[taps.index(number)](x))
        return visual.merger(x), deep

    def rotation(self, visual: Any, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of rows and columns of the grid that is left."""
        rates = visual.rotary_pos_emb.inv_freq.float()  # as transformers computes them
        row = torch.arange(h)[:, None].expand(h, w)[..., None]
        column = torch.arange(w).expand(h, w)[..., None]
        angles = blocks(torch.cat([row * rates, column * rates], dim=-1))
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    def kept(self, h: int, w: int) -> list[int]:
        """Places of windows among `h x w` tokens."""
        places = torch.arange(h * w).view(h, w)
        return places[:: self.side, :: self.side].flatten().tolist()


def at(values: Sequence[Tensor], places: Sequence[Sequence[int]]) -> list[Tensor]:
    """Rows of each."""
    return [own[list(where)] for own, where in zip(values, places, strict=True)]
