"""PVC written out: encoder layers and windows by hand, and a prompt of what is left."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tests.tiny import visual_positions
from torch import Tensor
from torch.nn import functional as F

from vispress.adapters.base import find_adapter


class SlowPVC:
    """A LLaVA without hooks, whose encoder pools.

    Args:
        family: `"llava"` or `"llava_next"`.
        model: Not compressed.
        pools: Parameters of its pools, by name.
        after: Encoder layers that run before each pooling.
    """

    def __init__(
        self, family: str, model: Any, pools: Mapping[str, Tensor], after: Sequence[int]
    ) -> None:
        self.family, self.model, self.pools, self.after = family, model, pools, list(after)
        self.side = 2 ** len(after)

    def pooled(self, x: Tensor, number: int) -> Tensor:
        """`[B, h, w, D]` to half as many rows and columns."""
        names = ("hidden.weight", "hidden.bias", "logits.weight", "logits.bias")
        first, bias, second, last = (self.pools[f"{number}.{name}"] for name in names)
        rows = []
        for i in range(0, x.shape[1], 2):
            row = []
            for j in range(0, x.shape[2], 2):
                window = [x[:, i, j], x[:, i, j + 1], x[:, i + 1, j], x[:, i + 1, j + 1]]
                mean = (window[0] + window[1] + window[2] + window[3]) / 4
                both = [torch.cat([own, mean], dim=-1) for own in window]
                logits = [F.gelu(one @ first.T + bias) @ second.T + last for one in both]
                parts = [one.exp() for one in logits]
                mixed = [part * own for part, own in zip(parts, window, strict=True)]
                row.append(sum(mixed) / sum(parts))
            rows.append(torch.stack(row, dim=1))
        return torch.stack(rows, dim=1)

    def encoded(self, pixels: Tensor) -> Tensor:
        """`[P, h', w', D]` behind the layer that gives the features."""
        tower = self.model.model.vision_tower
        tower = getattr(tower, "vision_model", tower)
        cls = int(hasattr(tower.embeddings, "class_embedding"))
        x = tower.embeddings(pixels)
        x = tower.pre_layrnorm(x) if cls else x
        side, layers = round((x.shape[1] - cls) ** 0.5), tower.encoder.layers
        depth = len(layers) + 1 + self.model.config.vision_feature_layer
        for number, layer in enumerate(layers[:depth]):
            x = x + attention(layer.self_attn, layer.layer_norm1(x))
            x = x + layer.mlp(layer.layer_norm2(x))
            if number + 1 in self.after:
                grid = x[:, cls:].unflatten(1, (side, side))
                grid, side = self.pooled(grid, self.after.index(number + 1)), side // 2
                x = torch.cat([x[:, :cls], grid.flatten(1, 2)], dim=1)
        return x[:, cls:].unflatten(1, (side, side))

    def images(self, inputs: Mapping[str, Any]) -> list[tuple[Tensor, list[int]]]:
        """`[K, D]` of each image, and their places among the image's tokens."""
        project = self.model.model.multi_modal_projector
        if self.family == "llava":
            grids = self.encoded(inputs["pixel_values"])
            places = torch.arange(grids[0, ..., 0].numel() * self.side**2)
            width = grids.shape[2] * self.side
            first = places.view(-1, width)[:: self.side, :: self.side].flatten().tolist()
            return [(project(grid.flatten(0, 1)), first) for grid in grids]
        counts = find_adapter(self.model)._crops(inputs)  # type: ignore[attr-defined]
        triples = zip(inputs["pixel_values"], counts, inputs["image_sizes"], strict=True)
        return [self.crops(pixels[:count], size) for pixels, count, size in triples]

    def crops(self, pixels: Tensor, size: Tensor) -> tuple[Tensor, list[int]]:
        """The same for the crops of one image, stitched and unpadded by the model."""
        grid, base = self.encoded(pixels), self.model.model
        names = torch.arange(1, grid[..., 0].numel() + 1).view(grid.shape[:3]).to(grid)
        spread = [
            values.repeat_interleave(self.side, 1).repeat_interleave(self.side, 2).flatten(1, 2)
            for values in (grid, names[..., None])
        ]
        features = self.stitched(base.multi_modal_projector(spread[0]), size, base.image_newline)
        places: list[int] = []
        seen, fresh = set(), False
        named = self.stitched(spread[1], size, names.new_zeros(1))[:, 0]
        for place, name in enumerate(named.tolist()):
            if name:
                stays = name not in seen
                fresh |= stays
                seen.add(name)
            else:  # a newline ends a line: it stays where the line has something new
                stays, fresh = fresh, False
            places += [place] if stays else []
        return features[places], places

    def stitched(self, values: Tensor, size: Tensor, newline: Tensor) -> Tensor:
        """Crops of one image as the model packs them."""
        packed, _ = self.model.model.pack_image_features(
            [values], size[None], vision_feature_select_strategy="default", image_newline=newline
        )
        return packed[0]  # type: ignore[no-any-return]

    def logits(self, inputs: Mapping[str, Any]) -> list[tuple[list[int], Tensor]]:
        """Places that each sample has left, and `[T, V]` of a prompt of those alone."""
        table, found = self.model.get_input_embeddings(), []
        images = iter(self.images(inputs))
        runs = visual_positions(self.family, self.model, dict(inputs))
        for ids, valid, own in zip(
            inputs["input_ids"], inputs["attention_mask"], runs, strict=True
        ):
            stays = dict(enumerate(table(ids[:, None])[:, 0]))
            for run in own:
                features, places = next(images)
                for position in run.tolist():
                    del stays[position]
                stays |= dict(zip(run[places].tolist(), features, strict=True))
            left = [position for position in sorted(stays) if valid[position]]
            embeds = torch.stack([stays[position] for position in left])[None]
            found.append((left, self.model(inputs_embeds=embeds).logits[0]))
        return found


def attention(module: Any, x: Tensor) -> Tensor:
    """`softmax(q k / sqrt(d)) v`, head by head."""
    heads = int(module.num_heads)
    query, key, value = (
        getattr(module, name)(x).unflatten(-1, (heads, -1)).unbind(2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    out = [
        (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v
        for q, k, v in zip(query, key, value, strict=True)
    ]
    projected: Tensor = module.out_proj(torch.cat(out, dim=-1))
    return projected
