"""Every geometry: methods that read where tokens stand meet their budget whatever the picture."""

import dataclasses
from bisect import bisect_right

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.methods.helpers import anyres, make_tokens, take
from tests.methods.test_contract import (
    VARIANTS,
    VIDEO_ONLY,
    count_for,
    counts_by_shape,
    with_module,
)

from vispress.methods import ADSC
from vispress.methods._parts.video.frames import Frames
from vispress.methods.base import segment_shares
from vispress.types import CropLayout, Signal

FEW = settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # cases are small; to shrink them takes minutes
    suppress_health_check=list(HealthCheck),
)


def layout_of(places, *, thumbnail):
    segment, row, col = torch.tensor(places).T
    return CropLayout(segment=segment, row=row, col=col, thumbnail=thumbnail)


@st.composite
def anyres_layouts(draw):
    """A thumbnail, and crops that the picture does not fill, in rows that end with a newline.

    Of a tall or wide picture nothing but newlines may be left. Crops are equal, or cut anywhere, as
    where a model resizes the whole.
    """
    side = draw(st.integers(1, 4))
    if draw(st.booleans()):
        rows, cols = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        top = draw(st.integers(0, rows * side // 2))
        left = 0 if top else draw(st.integers(0, cols * side // 2))
        return anyres(side, rows, cols, top=top, left=left, newlines=draw(st.booleans()))
    h, w = draw(st.integers(0, 12)), draw(st.integers(0, 9) | st.integers(0, 2))
    down = [0, *sorted(draw(st.sets(st.integers(1, 8), max_size=2)))]
    across = [0, *sorted(draw(st.sets(st.integers(1, 8), max_size=2)))]
    places = [(0, r, c) for r in range(side) for c in range(side)]
    for r in range(h):
        i = bisect_right(down, r) - 1
        for c in range(w):
            j = bisect_right(across, c) - 1
            places.append((1 + i * len(across) + j, r - down[i], c - across[j]))
        places.append((-1, -1, -1))
    return layout_of(places, thumbnail=True)


@st.composite
def tile_layouts(draw):
    """Tiles of one size, as InternVL's; the last one may be the thumbnail."""
    tiles, h, w = (draw(st.integers(1, 4)) for _ in range(3))
    places = [(t, r, c) for t in range(tiles) for r in range(h) for c in range(w)]
    return layout_of(places, thumbnail=False)


@st.composite
def frame_layouts(draw):
    """Frames of one size, and a newline at the end of the video."""
    number, h, w = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    places = [(f, r, c) for f in range(number) for r in range(h) for c in range(w)]
    return layout_of([*places, (-1, -1, -1)], thumbnail=False)


def grids(most):
    return st.tuples(st.integers(1, most), st.integers(1, 6), st.integers(1, 6))


def geometries(method):
    """What a model may show to a method."""
    needs = method.needs
    videos = st.one_of(
        grids(5).map(lambda grid: {"grid": grid}), frame_layouts().map(lambda x: {"crops": x})
    )
    if needs == "video":
        return videos
    crops = anyres_layouts() if needs == "anyres" else st.one_of(anyres_layouts(), tile_layouts())
    tall = st.builds(anyres, st.just(4), st.just(3), st.just(1), left=st.integers(1, 2))
    return st.one_of(videos, st.one_of(crops, tall).map(lambda layout: {"crops": layout}))


def drawn(data, method):
    """A bucket of two images of any geometry with at least two tokens."""
    geometry = data.draw(geometries(method))
    layout = geometry.get("crops")
    count = len(layout.segment) if layout is not None else torch.tensor(geometry["grid"]).prod()
    if count < 2:
        geometry = {"grid": (2, 1, 1)}
    layers = len(method.encoder_layers(6, 4))
    tokens = make_tokens(**geometry, encoder_layers=layers, seed=data.draw(st.integers(0, 9)))
    tokens = with_module(method, tokens)
    return dataclasses.replace(
        tokens,
        query_attention=None if method.name in EARLY else tokens.query_attention,
        context=dataclasses.replace(tokens.context, query=None, earlier=None),
    )


EARLY = {"catp", "holitom", "lvlm_csp", "prunevid", "vscan"}
"""Methods whose first placement is before the LLM and whose second reads its attention."""
READERS = [
    param
    for param in VARIANTS
    if param.values[0].signals() & {Signal.GRID, Signal.CROPS} and param.values[0].takes_budget
]


def counts_below(data, tokens):
    """A budget, often about as large as the newlines or as what is none."""
    newlines = int((tokens.segments()[0] < 0).sum())
    near = [
        count + off for count in (newlines, tokens.num_visual - newlines) for off in range(-2, 3)
    ]
    edges = sorted({count for count in near if 1 <= count < tokens.num_visual})
    any_of_them = st.integers(1, tokens.num_visual - 1)
    return data.draw(st.one_of(any_of_them, st.sampled_from(edges or [1])))


def check(method, tokens, asked):
    num_keep = count_for(method, tokens, asked)
    plan = method.plan(tokens, num_keep)
    plan.check(tokens, num_keep, exact=method.exact and counts_by_shape(method))
    plan.check_values(tokens)
    assert min(plan.counts) >= 1
    assert max(plan.counts) <= num_keep
    if plan.assign is not None:
        for assign, keep in zip(plan.assign, plan.keep, strict=True):
            assert assign[keep].tolist() == list(range(len(keep)))
    return plan


@settings(FEW, max_examples=300)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=30), st.data())
def test_shares_of_segments_add_up(segments, data):
    num_keep = data.draw(st.integers(1, len(segments)))
    shares = segment_shares(torch.tensor(segments), num_keep)
    assert sum(shares.values()) == num_keep
    newlines, others = segments.count(-1), len(segments) - segments.count(-1)
    assert all(0 <= share <= segments.count(each) for each, share in shares.items())
    if num_keep >= newlines + len({*segments} - {-1}):
        assert shares[-1] == newlines
    else:
        assert shares[-1] == max(0, num_keep - others)


@settings(FEW, max_examples=300)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9), st.data())
def test_shares_of_frames_and_newlines_add_up(number, size, newlines, data):
    places = torch.arange(number * size).view(number, size)
    video = Frames(places, number * size + torch.arange(newlines))
    num_keep = data.draw(st.integers(1, number * size + newlines))
    count, stay = video.split(num_keep)
    assert count + len(stay) == num_keep
    assert count <= number * size


@pytest.mark.parametrize("method", READERS)
def test_the_budget_is_met_on_every_geometry(method):
    @FEW
    @given(st.data())
    def holds(data):
        tokens = drawn(data, method)
        check(method, tokens, counts_below(data, tokens))

    holds()


WHOLE_ONLY = {"avg_pool", "fourier", "hicom", "quadtree_merge", *VIDEO_ONLY}
"""Methods that refuse what another one pruned before."""


@pytest.mark.parametrize(
    "method",
    [
        param
        for param in READERS
        if param.values[0].name not in WHOLE_ONLY and getattr(param.values[0], "dims", 1) == 1
    ],
)
def test_the_budget_is_met_on_what_another_method_left(method):
    @FEW
    @given(st.data())
    def holds(data):
        tokens = drawn(data, method)
        newline, most = tokens.segments()[0] < 0, tokens.num_visual
        few = min(most, int(newline.sum()) + 1)  # beside the newlines
        left = data.draw(st.integers(1, most) | st.integers(few, min(most, few + 4)))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
        random = torch.rand(2, tokens.num_visual, generator=generator)
        if data.draw(st.booleans()):
            random[1] = random[0]
        if data.draw(st.booleans()):
            random -= newline.float()  # these stay, as most methods let them
        pruned = take(tokens, random.argsort(dim=1)[:, :left].sort(dim=1).values)
        if left > 1:
            check(method, pruned, counts_below(data, pruned))

    holds()


@pytest.mark.parametrize("options", [{}, {"mode": "1d"}, {"offset": "first"}, {"stride": 3}])
def test_adsc_meets_each_of_its_budgets(options):
    @settings(FEW, max_examples=50)
    @given(st.data())
    def holds(data):
        ratio = data.draw(st.sampled_from([None, 0.35, 0.5, 0.75, 0.9]))
        method = ADSC(keep_ratio=ratio, **options)
        tokens = drawn(data, method)
        entered = tokens.num_visual
        for placement in method.placements(data.draw(st.sampled_from([6, 28, 32]))):
            num_keep = min(placement.budget.resolve(entered), tokens.num_visual)
            if num_keep == tokens.num_visual:
                continue
            plan = check(method, tokens, num_keep)
            kept = plan.keep if isinstance(plan.keep, torch.Tensor) else torch.stack([*plan.keep])
            tokens = dataclasses.replace(take(tokens, kept), memory=plan.memory)

    holds()
