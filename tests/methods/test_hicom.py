"""HICom against loops: windows, both branches, places of new tokens, counts, gradients."""

import dataclasses
import math
from itertools import pairwise, product

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens
from torch.nn import functional as F

from vispress.errors import BudgetError, ConfigError, UnsupportedMethodError
from vispress.methods import HICom
from vispress.methods._parts.geometry.clips import (
    Clip,
    clips,
    coordinates,
    window_places,
    window_starts,
)
from vispress.types import CropLayout, ModuleShape

SHAPE = ModuleShape(width=8, vision_width=6, num_layers=4, num_heads=2, vision_layers=2)


def with_module(method, tokens, seed=None, spread=0.5):
    """The tokens in fp64 with fresh parameters, or drawn ones."""
    torch.manual_seed(0)
    module = method.make_module(SHAPE).double()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=spread, generator=generator)
    fields = {
        name: getattr(tokens, name).double()
        for name in ("features", "vision_features", "text_embeddings")
    }
    return dataclasses.replace(tokens, module=module, **fields)


def image(h, w, **kwargs):
    return make_tokens(grid=(1, h, w), **kwargs)


# --- windows


@pytest.mark.parametrize("n", range(1, 21))
def test_balanced_windows_cover_every_place(n):
    for size in range(1, 8):
        starts = window_starts(n, size)
        assert len(starts) == math.ceil(n / size)
        assert starts[0] == 0
        assert all(a < b for a, b in pairwise(starts))
        assert max(b - a for a, b in pairwise([*starts, starts[-1] + size])) <= size
        if n >= size:
            assert starts[-1] == n - size
            steps = torch.linspace(0, n - size, len(starts), dtype=torch.float64)
            assert list(starts) == steps.round().long().tolist()
        found = window_places(n, size)
        assert found.shape == (len(starts), size)
        assert set(found.flatten().tolist()) == set(range(n))


def test_windows_by_hand():
    assert window_starts(27, 3) == tuple(range(0, 27, 3))
    assert window_starts(5, 3) == (0, 2)
    assert window_starts(9, 4) == (0, 2, 5)  # halves go to the even one
    assert window_places(2, 4).tolist() == [[0, 1, 1, 1]]


@pytest.mark.parametrize("size", [(1, 5, 7), (3, 2, 4), (4, 6, 3), (1, 1, 1)])
def test_queries_are_the_resized_map(size):
    for window in product((1, 2, 4), (1, 2, 3), (3,)):
        clip = Clip(size, torch.randperm(math.prod(size)), window)
        x = torch.randn(2, math.prod(size), 5, dtype=torch.float64)
        grid = x[:, clip.places].unflatten(1, size).movedim(-1, 1)
        expected = F.interpolate(grid, size=clip.shape, mode="trilinear", align_corners=False)
        assert torch.allclose(clip.resized(x), expected.flatten(2).mT, atol=1e-12)


def test_frames_of_a_video_are_one_clip_and_crops_are_apart():
    assert [c.size for c in clips(make_tokens(grid=(5, 4, 6)), (4, 3, 3))] == [(5, 4, 6)]
    composed = make_tokens(crops=anyres(4, 1, 3, top=1))
    assert [c.size for c in clips(composed, (4, 3, 3))] == [(1, 4, 4), *[(1, 2, 4)] * 3]
    frame = torch.arange(12)
    end = torch.tensor([-1])
    layout = CropLayout(  # as LLaVA-OneVision has videos: frames, and a newline
        segment=torch.cat([frame // 4, end]),
        row=torch.cat([frame % 4 // 2, end]),
        col=torch.cat([frame % 2, end]),
    )
    assert [c.size for c in clips(make_tokens(crops=layout), (4, 3, 3))] == [(3, 2, 2)]


def test_clips_follow_each_other_in_time():
    tokens = make_tokens(crops=anyres(2, 1, 2))
    found = coordinates(clips(tokens, (4, 3, 3)))
    layout = tokens.crops
    expected = torch.stack([layout.segment, layout.row, layout.col], dim=1)
    assert torch.equal(found[:, 1:], expected[found[:, 0]])
    assert sorted(found[:, 0].tolist()) == [i for i in range(14) if i not in (8, 13)]
    video = coordinates(clips(make_tokens(grid=(2, 2, 3)), (4, 3, 3)))
    assert video.tolist() == [
        [i, *at] for i, at in enumerate(product(range(2), range(2), range(3)))
    ]


# --- counts


@pytest.mark.parametrize(
    ("frames", "side", "count"), [(32, 27, 680), (64, 27, 1328), (128, 27, 2624), (1, 27, 113)]
)
def test_published_counts(frames, side, count):
    tokens = make_tokens(batch=1, grid=(frames, side, side), dim=2, heads=1, queries=1)
    method = HICom()
    for asked, given in ((method, tokens.num_visual), (HICom(num_tokens=count), count)):
        own = asked.arrange(tokens, given)
        assert len(own.keep) == count
        assert own.num_global == 32
        assert {clip.window for clip in own.local} == {(4, 3, 3)}


def test_a_budget_chooses_the_side():
    tokens = image(24, 24)
    method = HICom(num_tokens=1)
    found = {}
    for budget in (1, 2, 5, 40, 95, 96, 400):
        own = method.arrange(tokens, budget)
        found[budget] = own.local[0].window[1], own.num_global
        assert len(own.keep) <= budget
    assert found == {
        **{1: (24, 0), 2: (24, 1), 5: (24, 4), 40: (6, 24)},
        **{95: (4, 32), 96: (3, 32), 400: (2, 32)},
    }


def test_a_budget_without_room_for_windows_has_global_tokens():
    tokens = make_tokens(crops=anyres(4, 2, 2))
    own = HICom(num_tokens=4).arrange(tokens, 4)
    assert (own.local, own.num_global, len(own.newlines)) == ((), 4, 0)
    video = make_tokens(grid=(9, 2, 2))
    assert HICom(num_tokens=2).arrange(video, 2).num_global == 2
    with pytest.raises(BudgetError, match=r"budget of 2 tokens has no room for 3 windows"):
        HICom(num_tokens=2, num_global=0).arrange(video, 2)


def test_a_small_image_has_fewer_global_tokens():
    own = HICom().arrange(image(4, 4), 16)
    assert (len(own.keep), own.num_global) == (16, 12)
    assert HICom(side=1).arrange(image(4, 4), 16).num_global == 0


# --- places


def test_local_tokens_stand_at_centres_and_global_ones_last():
    own = HICom(num_global=3).arrange(image(6, 7), 42)
    # rows 0-2, 3-5; columns 0-2, 2-4, 4-6
    assert own.keep.tolist() == [8, 10, 12, 29, 31, 33, 39, 40, 41]
    assert own.order.tolist() == list(range(9))


def test_local_tokens_come_first_where_the_last_window_is_small():
    own = HICom(num_global=4, side=1).arrange(image(1, 8), 8)
    assert own.num_global == 0  # every place is a window
    own = HICom(num_global=4, side=2).arrange(image(1, 8), 8)
    assert own.keep.tolist() == list(range(8))
    assert own.order.tolist() == list(range(8))


def test_newlines_stay_and_crops_are_in_raster_order():
    tokens = make_tokens(crops=anyres(2, 1, 2))
    # thumbnail 0-3, then two rows of 2 + 2 tokens and a newline
    method = HICom(num_global=2, side=2)
    own = method.arrange(tokens, tokens.num_visual)
    assert own.newlines.tolist() == [8, 13]
    # windows are at 0, 4, 6; the last others are 11 and 12
    assert own.keep.tolist() == [0, 4, 6, 8, 11, 12, 13]
    assert own.order.tolist() == [0, 1, 2, 5, 3, 4, 6]
    tokens = with_module(method, tokens, 1)
    plan = method.plan(tokens, tokens.num_visual)
    assert torch.equal(plan.features[:, [3, 6]], tokens.features[:, [8, 13]])


def test_crops_that_lie_side_by_side_get_their_own_values():
    """Windows of a second crop's first row stand before those of the first crop's second row."""
    method = HICom(num_global=0, side=2)
    tokens = with_module(method, make_tokens(crops=anyres(4, 1, 2, newlines=False)), 2)
    plan = method.plan(tokens, tokens.num_visual)
    layout = tokens.crops
    places = list(zip(layout.segment.tolist(), layout.row.tolist(), layout.col.tolist()))  # noqa: B905
    for slot, place in enumerate(plan.keep[0].tolist()):
        segment, row, col = places[place]
        corner = {(segment, row + i, col + j) for i in (0, 1) for j in (0, 1)}
        members = [i for i, at in enumerate(places) if at in corner]
        expected = by_query(tokens, members, condition(tokens)[:, 0])
        assert torch.allclose(plan.features[:, slot], tokens.projector(expected), atol=1e-9)


# --- the branches, in loops


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def linear(dense, x):
    return x @ dense.weight.mT + dense.bias


def norm(own, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * own.weight + own.bias


def condition(tokens):
    """`[B, 1 + T, Dv]`: the mean of the text behind the image, then its words."""
    text = tokens.text_embeddings[:, -tokens.text_after :]
    words = torch.cat([text.mean(1, keepdim=True), text], 1)
    normed, first, _, second = tokens.module.condition
    return linear(second, gelu(linear(first, norm(normed, words))))


def by_query(tokens, members, query):
    """What a query `[B, Dv]` finds in some tokens."""
    keys = tokens.vision_features[:, members]
    weights = torch.softmax((keys * query[:, None]).sum(-1) / math.sqrt(keys.shape[-1]), dim=1)
    return sum(weights[:, i, None] * keys[:, i] for i in range(len(members)))


def attended(own, queries, keys, values):
    """Attention of one head (widths below 256 have one)."""
    q, k, v = linear(own.query, queries), linear(own.key, keys), linear(own.value, values)
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
    return linear(own.out, weights @ v)


def injected(own, kind, queries, words):
    if kind == "fine":
        return norm(own.norm, queries + attended(own.attend, queries, words[:, 1:], words[:, 1:]))
    first, _, second = own.change
    scale, shift = linear(second, gelu(linear(first, words[:, :1]))).chunk(2, -1)
    return norm(own.norm, queries * (1 + scale) + shift)


def wave(t, row, col):
    """Of width 6: a sine and a cosine of each."""
    return [f(x) for x in (t, row, col) for f in (math.sin, math.cos)]


@pytest.mark.parametrize(
    ("local", "whole"),
    [("direct", "coarse"), ("off", "fine"), ("coarse", "off"), ("fine", "coarse")],
)
def test_both_branches_are_the_formulas(local, whole):
    """A video of 3 x 4 x 5 tokens, windows of 2 x 3 x 3 that overlap: 2 x 2 x 2 of them."""
    method = HICom(local_injection=local, global_injection=whole, num_global=3, frames=2)
    tokens = with_module(method, make_tokens(grid=(3, 4, 5)), 5)
    plan = method.plan(tokens, 60)
    words, module = condition(tokens), tokens.module
    x = tokens.vision_features
    grid = x.unflatten(1, (3, 4, 5)).movedim(-1, 1)
    resized = F.interpolate(grid, size=(2, 2, 2), mode="trilinear").flatten(2).mT
    queries = resized
    if local == "direct":
        queries = words[:, :1].expand(-1, 8, -1)
    elif local != "off":
        queries = injected(module.local, local, resized, words)
    made = []
    starts = product((0, 1), (0, 1), (0, 2))
    for number, (t0, r0, c0) in enumerate(starts):
        members = [
            (t0 + t) * 20 + (r0 + r) * 5 + c0 + c
            for t, r, c in product(range(2), range(3), range(3))
        ]
        made.append(by_query(tokens, members, queries[:, number]))
    learned = module.queries.expand(2, -1, -1)
    if whole != "off":
        learned = injected(module.whole, whole, learned, words)
    at = torch.tensor([wave(*at) for at in product(range(3), range(4), range(5))]).double()
    found = learned + attended(module.attend, learned, x + at, x)
    expected = tokens.projector(torch.cat([torch.stack(made, 1), found], 1))
    assert torch.allclose(plan.features, expected, rtol=1e-6, atol=1e-6)
    assert plan.keep[0].tolist() == [6, 8, 11, 13, 26, 28, 31, 33, 57, 58, 59]


def test_direct_queries_look_at_the_question_alone():
    """With one question all windows have one query, whatever the image shows."""
    method = HICom(num_global=0)
    tokens = with_module(method, image(6, 6), 7)
    base = method.plan(tokens, 36).features
    same = dataclasses.replace(tokens, text_embeddings=tokens.text_embeddings.flip(1))
    other = dataclasses.replace(tokens, text_embeddings=-tokens.text_embeddings)
    assert not torch.allclose(method.plan(other, 36).features, base, atol=1e-3)
    kept = tokens.text_after
    by_hand = dataclasses.replace(tokens, text_embeddings=tokens.text_embeddings[:, -kept:])
    assert torch.equal(method.plan(by_hand, 36).features, base)
    assert not torch.equal(method.plan(same, 36).features, base)  # another text is behind it


@pytest.mark.parametrize("local", ["off", "direct", "coarse", "fine"])
def test_without_text_all_is_finite(local):
    method = HICom(local_injection=local, global_injection="fine")
    tokens = with_module(method, image(5, 5))
    bare = dataclasses.replace(tokens, text_embeddings=tokens.text_embeddings[:, :0], text_after=0)
    assert method.plan(bare, 25).features.isfinite().all()


# --- training


def stepped(method, steps):
    """Which parameters had a gradient in some step, and the plan behind them."""
    tokens = with_module(method, make_tokens(grid=(2, 6, 6)))
    module, reached = tokens.module, set()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    target = torch.randn(8, generator=torch.Generator().manual_seed(3)).double()
    for _ in range(steps):
        plan = method.plan(tokens, tokens.num_visual)
        optimiser.zero_grad()
        (plan.features * target).square().mean().backward()
        reached |= {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
        optimiser.step()
    return {n for n, _ in module.named_parameters()}, reached, method.plan(tokens, 72)


@pytest.mark.parametrize("whole", ["off", "coarse", "fine"])
@pytest.mark.parametrize("local", ["off", "direct", "coarse", "fine"])
def test_two_steps_reach_every_parameter(local, whole):
    """A bias of keys is the same for all of them: no softmax sees it."""
    method = HICom(local_injection=local, global_injection=whole)
    names, reached, _ = stepped(method, 2)
    assert {n for n in names - reached if not n.endswith("attend.key.bias")} == set()


@pytest.mark.parametrize("whole", ["off", "coarse", "fine"])
def test_global_tokens_differ_behind_one_step(whole):
    method = HICom(global_injection=whole, num_global=16)
    for steps in (0, 1):
        plan = stepped(method, steps)[2]
        made = plan.features[0, -16:]
        apart = torch.cdist(made, made) + 9 * torch.eye(16, dtype=made.dtype)
        assert apart.min() > 1e-6


def test_scales_and_shifts_begin_at_none():
    """Injection that begins changes nothing but the norm of queries."""
    module = HICom(local_injection="coarse").make_module(SHAPE)
    queries, words = torch.randn(1, 4, 6), torch.randn(1, 3, 6)
    expected = F.layer_norm(queries, (6,))
    assert torch.allclose(module.local(queries, words), expected, atol=1e-6)
    assert 0.005 < module.queries.std() < 0.03


def test_heads_are_of_about_128():
    for width, heads in ((1152, 9), (1024, 8), (1280, 10), (6, 1), (300, 2), (1300, 10)):
        shape = dataclasses.replace(SHAPE, vision_width=width)
        with torch.device("meta"):
            module = HICom(num_global=1).make_module(shape)
        assert module.attend.heads == heads


# --- refusals


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"local_injection": "none"}, "local_injection must be one of 'off', 'direct'"),
        ({"global_injection": "direct"}, "global_injection must be one of 'off', 'coarse', 'fine'"),
        ({"num_global": -1}, "num_global must be an integer >= 0"),
        ({"side": 0}, "side must be"),
        ({"frames": True}, "frames must be"),
        ({"side": 3, "num_tokens": 9}, "a budget chooses the side, got side=3"),
        ({"local_injection": "off", "num_global": 0}, "nothing is trained"),
    ],
)
def test_bad_settings_are_refused(bad, says):
    with pytest.raises(ConfigError, match=says):
        HICom(**bad)


@pytest.mark.refusal
def test_images_that_were_pruned_before_are_refused():
    tokens = make_tokens(grid=(1, 3, 3))
    left = dataclasses.replace(tokens, features=tokens.features[:, :5], index=tokens.index[:, :5])
    with pytest.raises(UnsupportedMethodError, match="whole images"):
        HICom().plan(dataclasses.replace(with_module(HICom(), left)), 5)
