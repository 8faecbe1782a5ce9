"""Adapters against the models: values travel to visual tokens as the model's features do."""

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.tiny import (
    FAMILIES,
    QWEN,
    VIDEO,
    Image,
    Sample,
    Text,
    Video,
    build,
    make_inputs,
    visual_positions,
)
from torch import Tensor, nn

from vispress.adapters.base import find_adapter, list_families
from vispress.types import Signal

ANYRES = ("llava_next", "llava_onevision")
CASES = [(f, "image") for f in FAMILIES] + [(f, "video") for f in VIDEO]
IMAGES = [
    Sample([Text(2), Image(4, 4), Text(3), Image(3, 7)]),
    Sample([Text(2), Image(9, 5), Text(3)]),
    Sample([Text(4)]),
    Sample([Image(7, 2), Text(1)]),
]
VIDEOS = [
    Sample([Text(2), Video(3, 3, 5), Text(3)]),
    Sample([Video(3, 2, 7), Text(1), Video(3, 4, 4)]),
]
BIG = [Sample([Image(20, 13), Text(2)]), Sample([Image(20, 20), Text(2)])]
"""Beyond nine crops: OneVision resizes them."""


class Seen:
    """One call of the model's feature method, and what its projector took and gave."""

    def __init__(self, family: str, modality: str, samples: Sequence[Sample]) -> None:
        self.model = build(family)
        self.adapter = find_adapter(self.model)
        self.inputs = make_inputs(family, samples, padding="left")
        base = self.model.model
        method = getattr(base, f"get_{modality}_features")
        names = inspect.signature(method).parameters
        pixels = "pixel_values" if modality == "image" else "pixel_values_videos"
        self.call = {k: v for k, v in self.inputs.items() if k in names and k != "pixel_values"}
        # LLaVA-OneVision called the pixels of a video `pixel_values`, too, until 5.17
        self.call[pixels if pixels in names else "pixel_values"] = self.inputs[pixels]
        self.raw: Any = None
        self.out: Any = None

        def note(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            assert self.raw is None, "the projector is called once"
            self.raw, self.out = args[0], out

        handle = self.adapter.projector.register_forward_hook(note)
        with torch.no_grad():
            output = method(**self.call, return_dict=True)
        handle.remove()
        self.features = self.adapter.features(modality, output)
        self.counts = [len(f) for f in self.features]
        self.layouts = self.adapter.layouts(modality, self.counts, self.call)


def newlines(layout: Any, count: int) -> Tensor:
    """`[N]` bool."""
    _, crops = layout
    return torch.zeros(count, dtype=torch.bool) if crops is None else crops.segment == -1


def samples_of(family: str, modality: str) -> list[Sample]:
    if modality == "video":
        return VIDEOS
    return IMAGES + (BIG if family == "llava_onevision" else [])


@pytest.mark.parametrize(("family", "modality"), CASES)
def test_counts_are_the_placeholders(family: str, modality: str) -> None:
    seen = Seen(family, modality, samples_of(family, modality))
    items = [p for s in visual_positions(family, seen.model, seen.inputs) for p in s]
    assert seen.counts == [len(p) for p in items]
    ids = seen.inputs["input_ids"]
    placeholder = seen.adapter.placeholders()[modality]
    assert sum(seen.counts) == int((ids == placeholder).sum())
    for count, (grid, crops) in zip(seen.counts, seen.layouts, strict=True):
        assert (grid is None) != (crops is None)
        if grid is not None:
            assert grid[0] * grid[1] * grid[2] == count
        else:
            assert len(crops.segment) == len(crops.row) == len(crops.col) == count
            assert ((crops.segment == -1) == (crops.row == -1)).all()
            assert ((crops.segment == -1) == (crops.col == -1)).all()


@pytest.mark.parametrize(("family", "modality"), CASES)
def test_grids_over_whole_pictures_are_those_of_the_layouts(family: str, modality: str) -> None:
    seen = Seen(family, modality, samples_of(family, modality))
    grids = seen.adapter.picture_grids(modality, seen.inputs)
    if family in (*ANYRES, "internvl"):
        assert grids is None
        assert seen.adapter.picture_grids(modality, {}) is None
    else:
        assert grids == [grid for grid, _ in seen.layouts]
        assert seen.adapter.picture_grids(modality, {}) == []


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.startswith("llava")])
def test_packed_projector_outputs_are_the_features(family: str) -> None:
    modalities = ("image", "video") if family in VIDEO else ("image",)
    for modality in modalities:
        seen = Seen(family, modality, samples_of(family, modality))
        packed = seen.adapter.pack(modality, seen.out, seen.call)
        assert len(packed) == len(seen.features)
        for mine, own, layout in zip(packed, seen.features, seen.layouts, strict=True):
            broken = newlines(layout, len(own))
            assert torch.equal(mine[~broken], own[~broken])
            assert not mine[broken].any()
            assert (own[broken] == getattr(seen.model.model, "image_newline", 0)).all()
            assert broken.any() == (family in ANYRES)


# not where the model mixes behind the projector: OneVision's videos and resized images
@pytest.mark.parametrize(
    ("family", "modality"), [c for c in CASES if c != ("llava_onevision", "video")]
)
def test_projected_packed_inputs_are_the_features(family: str, modality: str) -> None:
    seen = Seen(family, modality, VIDEOS if modality == "video" else IMAGES)
    rows = seen.adapter.projector_inputs(modality, seen.raw, seen.call)
    packed = seen.adapter.pack(modality, rows, seen.call)
    for inputs, own, layout in zip(packed, seen.features, seen.layouts, strict=True):
        kept = ~newlines(layout, len(own))
        with torch.no_grad():
            mine = seen.adapter.project(seen.adapter.projector, inputs)
            pair = seen.adapter.project(seen.adapter.projector, torch.stack([inputs, inputs]))
        assert (mine - own)[kept].abs().max() < 1e-12
        assert pair.shape == (2, *own.shape)
        assert (pair[1] - own)[kept].abs().max() < 1e-12


def coordinates(family: str, modality: str, seen: Seen) -> Tensor:
    """Encoder-side values that say where each patch is: `[..., 3]` with (frame, row, column)."""
    if family in QWEN:
        from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

        grid = seen.call[f"{modality}_grid_thw"]
        places = get_vision_position_ids(grid, 2)
        frame = torch.cat([torch.arange(t).repeat_interleave(h * w) for t, h, w in grid.tolist()])
        values = torch.cat([frame[:, None], places], dim=1).double()
        if family == "qwen2_5_vl":
            visual = seen.model.model.visual
            index, _ = get_vision_window_index(grid, 2, visual.window_size, visual.patch_size)
            values = visual.permute_input_for_window_attn(values, index, len(values))
        return values
    count, (h, w) = len(seen.raw), PATCHES[family]
    row = torch.arange(h).repeat_interleave(w).repeat(count)
    col = torch.arange(w).repeat(count * h)
    number = torch.arange(count).repeat_interleave(h * w)
    return torch.stack([number, row, col], dim=1).double().view(count, h * w, 3)


PATCHES = {"llava": (6, 6), "llava_next": (4, 4), "llava_onevision": (5, 5), "internvl": (8, 8)}


@pytest.mark.parametrize(("family", "modality"), CASES)
def test_layouts_say_where_packed_patches_came_from(family: str, modality: str) -> None:
    seen = Seen(family, modality, VIDEOS if modality == "video" else IMAGES)
    packed = seen.adapter.pack(modality, coordinates(family, modality, seen), seen.call)
    size = 2 if family in (*QWEN, "internvl") else 1
    start = 0
    for mine, (grid, crops) in zip(packed, seen.layouts, strict=True):
        first = mine[:, 0].min() if grid else start
        if grid is not None:
            t, h, w = grid
            axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
            place = torch.stack([a.flatten() for a in axes], dim=1)
        else:
            place = torch.stack([crops.segment, crops.row, crops.col], dim=1)
            mine, place = mine[crops.segment >= 0], place[crops.segment >= 0]
            start += int(place[:, 0].max()) + 1
        if family == "llava_onevision" and modality == "video":
            # 5 -> 3 by bilinear resizing, half-pixel centres
            expected = place.double()
            expected[:, 1:] = expected[:, 1:] * 5 / 3 + 1 / 3
        else:
            expected = place * torch.tensor([1, size, size]) + torch.tensor(
                [0, *[(size - 1) / 2] * 2]
            )
        expected = expected + torch.tensor([float(first), 0, 0])
        assert (mine - expected).abs().max() < 1e-6


def test_onevision_layout_of_resized_images() -> None:
    seen = Seen("llava_onevision", "image", BIG)
    for count, (_, crops), size in zip(
        seen.counts, seen.layouts, ((20, 13), (20, 20)), strict=True
    ):
        assert crops.segment[:25].eq(0).all()
        segment, row, col = (getattr(crops, k)[25:] for k in ("segment", "row", "col"))
        broken = segment == -1
        height = int(broken.sum())
        width = (count - 25) // height - 1
        assert broken.view(height, -1)[:, -1].all()
        assert (height, width) < size
        assert height / width == pytest.approx(size[0] / size[1], rel=0.15)
        seen_crops = segment[~broken].view(height, width)
        assert (seen_crops.diff(dim=0) >= 0).all()
        assert (seen_crops.diff(dim=1) >= 0).all()
        # the crop that holds a token's centre: its mixture lies within half a crop of it
        index = torch.arange(16.0, dtype=torch.float64)
        crop = torch.stack([index // 4, index % 4], dim=1)
        values = torch.cat([crop[:1], crop]).repeat(2, 1)[:, None].expand(-1, 25, -1)
        mixed = seen.adapter.pack("image", values, seen.call)[size == (20, 20)][25:]
        mixed = mixed[~broken].view(height, width, 2)
        assert (mixed - crop[seen_crops - 1]).abs().max() <= 0.5
        # the grid is whole: places of a crop are a full rectangle that starts at 0
        for each in seen_crops.unique():
            own = segment == each
            rows, cols = row[own], col[own]
            assert (rows.min(), cols.min()) == (0, 0)
            assert (rows.max() + 1) * (cols.max() + 1) == own.sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_feature_layer_is_what_the_projector_reads(family: str) -> None:
    model = build(family)
    adapter = find_adapter(model)
    attention = adapter.encoder_attentions()[adapter.feature_layer()]
    (layer,) = [m for m in model.modules() if attention in list(m.children())]
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []
    layer.register_forward_hook(
        lambda m, a, out: outputs.append(out if isinstance(out, Tensor) else out[0])
    )
    adapter.projector.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    with torch.no_grad():
        model(**make_inputs(family, [Sample()]))
    (out,), (raw,) = outputs, inputs
    out = out[:, 1:] if adapter.has_cls else out
    if family == "internvl":
        out = model.model.pixel_shuffle(out.reshape(len(out), 8, 8, -1)).flatten(1, 2)
    assert torch.equal(out, raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_facts(family: str) -> None:
    model = build(family)
    adapter = find_adapter(model)
    assert adapter.family == family
    assert adapter.has_cls == (family in ("llava", "llava_next", "internvl"))
    assert (Signal.CLS_ATTENTION in adapter.signals()) == adapter.has_cls
    assert (adapter.mrope, adapter.packed) == ((True, True) if family in QWEN else (False, False))
    assert set(adapter.placeholders()) == ({"image", "video"} if family in VIDEO else {"image"})
    assert len(adapter.decoder_layers) == 6
    assert len(adapter.encoder_attentions()) == 4
    expected = [1, 3] if family == "qwen2_5_vl" else [0, 1, 2, 3]
    assert list(adapter.global_layers()) == expected
    assert family in list_families()


def test_a_model_is_found_through_wrappers() -> None:
    model = build("llava")
    wrapper = nn.Module()
    wrapper.inner = model
    assert find_adapter(wrapper).base is model.model
    assert find_adapter(model.model).base is model.model
