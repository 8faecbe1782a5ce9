"""SD-RPN by hand: what the head asks, the smoothing, the region and its context."""

import dataclasses

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, take

from vispress.errors import ConfigError
from vispress.methods import SDRPN
from vispress.methods.sd_rpn import RegionHead, smoothed

SHAPE = (1, 4, 5)


def raster(**changes):
    """One plain image of 4 x 5 tokens."""
    return dataclasses.replace(make_tokens(batch=1, grid=SHAPE), **changes)


def told(logits, method, **changes):
    """What is kept where the head gives these logits."""
    tokens = raster(module=lambda x, asking: logits.to(x), input_norm=lambda x: x, **changes)
    num_keep = 20 if method.threshold else method.budget(2, 1).resolve(20)
    return method.plan(tokens, num_keep).keep[0].tolist()


def test_logits_are_a_mean_over_heads_of_scaled_products():
    head = RegionHead(6, 3)
    x, asking = torch.randn(2, 4, 6), torch.randn(2, 6)
    query = asking @ head.query.weight.mT + head.query.bias
    key = x @ head.key.weight.mT + head.key.bias
    expected = torch.stack(
        [
            torch.einsum("bd,bnd->bn", query[:, h : h + 2], key[..., h : h + 2]) / 2**0.5
            for h in (0, 2, 4)
        ]
    ).mean(0)
    torch.testing.assert_close(head(x, asking), expected)


def test_the_head_is_asked_by_the_last_prompt_token_behind_the_norm():
    seen = []

    def module(x, asking):
        seen.extend((x, asking))
        return x.sum(-1)

    tokens = raster(module=module, input_norm=lambda x: 2 * x)
    SDRPN(num_tokens=5).plan(tokens, 5)
    torch.testing.assert_close(seen[0], 2 * tokens.features)
    torch.testing.assert_close(seen[1], 2 * tokens.text_states[:, -1])


def test_smoothing_is_a_gaussian_over_the_cells_that_are_there():
    tokens, score = raster(), torch.rand(1, 20)
    near, far = torch.tensor(-0.5).exp(), torch.tensor(-1.0).exp()
    kernel = torch.tensor([[far, near, far], [near, 1.0, near], [far, near, far]])[None, None]
    grid = score.view(1, 1, 4, 5)
    total = torch.nn.functional.conv2d(grid, kernel, padding=1)
    weight = torch.nn.functional.conv2d(torch.ones_like(grid), kernel, padding=1)
    torch.testing.assert_close(smoothed(tokens, score), (total / weight).view(1, 20))
    # cells 0, 1 and 19 are left: the last is alone, and the others have each other
    left = take(tokens, torch.tensor([[0, 1, 19]]))
    found = smoothed(left, torch.tensor([[1.0, 0.0, 0.5]]))
    expected = torch.tensor([[1 / (1 + near), near / (1 + near), 0.5]])
    torch.testing.assert_close(found, expected)


def test_sub_images_do_not_smooth_each_other_and_newlines_stand_alone():
    layout = anyres()
    tokens = dataclasses.replace(make_tokens(batch=1, crops=layout))
    segment = layout.segment
    for number in segment.unique().tolist():
        score = (segment == number).float()[None]
        found = smoothed(tokens, score)
        torch.testing.assert_close(found, score)


def test_a_region_beats_a_lone_cell():
    """A block of middling logits against one high cell among low ones."""
    logits = torch.full((1, 20), -4.0)
    logits[0, [0, 1, 5, 6]] = 1.5
    logits[0, 18] = 4.0
    assert told(logits, SDRPN(num_tokens=4, layer=1, context=0.0)) == [0, 1, 5, 6]


def test_in_place_of_a_budget_a_threshold_decides_and_one_stays_at_least():
    logits = torch.full((1, 20), -8.0)
    assert told(logits, SDRPN(threshold=0.15)) == [0]
    logits[0, :10] = 8.0
    assert told(logits, SDRPN(threshold=0.9)) == [0, 1, 2, 3, 4]  # the lower row has low neighbours
    with pytest.raises(ConfigError, match=r"threshold=0\.3 decides how many stay"):
        SDRPN(keep_ratio=0.5, threshold=0.3)


def test_context_lies_at_equal_steps():
    logits = torch.zeros(1, 20)
    logits[0, :5] = 8.0
    kept = told(logits, SDRPN(num_tokens=6, layer=1, context=0.5))
    assert {3, 10, 16} <= set(kept)
    assert set(kept) - {3, 10, 16} <= set(range(6))


def test_where_nobody_asks_all_score_alike():
    tokens = raster()
    tokens = dataclasses.replace(tokens, text_states=tokens.text_states[:, :0])
    method = SDRPN(num_tokens=3, context=0.0)
    tokens = dataclasses.replace(tokens, module=RegionHead(8, 2), input_norm=lambda x: x)
    assert method.plan(tokens, 3).keep.tolist() == [[0, 1, 2]]


def test_its_layer_is_scaled_and_checked():
    assert [p.layer for p in SDRPN(keep_ratio=0.5).placements(32)] == [15]
    assert [p.layer for p in SDRPN(keep_ratio=0.5, layer=3).placements(6)] == [3]
    with pytest.raises(ConfigError, match="layer"):
        SDRPN(keep_ratio=0.5, layer=6).placements(6)
    for wrong in ({"context": 1.5}, {"threshold": 0.0}, {"layer": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            SDRPN(**wrong)
