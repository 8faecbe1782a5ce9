"""VisionZip: dominant and contextual tokens, by hand."""

import pytest
import torch
from tests.methods.helpers import anyres, make_tokens, merged, only
from tests.methods.test_divprune import GOLDEN

from vispress.errors import ConfigError
from vispress.methods import VisionZip
from vispress.methods.visionzip import owners


def golden_tokens():
    # nothing is dominant: attention plays no part
    attention = torch.zeros(1, 1, 8)
    keys = GOLDEN[None, None]
    return only(vision_features=GOLDEN[None], vision_keys=keys, cls_attention=attention)


def test_golden_vector():
    tokens = golden_tokens()
    plan = VisionZip(contextual=3).plan(tokens, 3)
    assert plan.keep.tolist() == [[0, 2, 4]]
    assert plan.assign.tolist() == [[0, 0, 1, 1, 2, 0, 2, 0]]
    expected = [[1.7333, 0.1667, 0.1667], [0, 1.9, 0.2], [-0.2, 0.1, 1.9]]
    torch.testing.assert_close(
        merged(plan, tokens.vision_features)[0], torch.tensor(expected), rtol=0, atol=5e-5
    )


def test_targets_are_every_step_th_of_the_rest():
    # 7 left, 2 targets: every third, of which 6 is one too many
    owner = owners(torch.zeros(1, 7), torch.randn(1, 7, 4), dominant=0, contextual=2)
    assert set(owner[0].tolist()) == {0, 3}


def test_dominant_tokens_pass_unchanged():
    tokens = make_tokens(2, 30)
    plan = VisionZip(contextual=4).plan(tokens, 14)
    score = tokens.cls_attention.mean(dim=1)
    values = merged(plan, tokens.vision_features)
    for b in range(2):
        top = score[b].topk(10).indices.sort().values
        slots = torch.searchsorted(plan.keep[b], top)
        assert torch.equal(plan.keep[b, slots], top)
        torch.testing.assert_close(values[b, slots], tokens.vision_features[b, top])


def test_every_token_is_folded_somewhere_and_weights_are_shares():
    plan = VisionZip(contextual=4).plan(make_tokens(1, 30), 14)
    assert (plan.assign >= 0).all()
    for slot in range(14):
        members = plan.assign[0] == slot
        others = members.clone()
        others[plan.keep[0, slot]] = False
        assert plan.weight[0, plan.keep[0, slot]] == 1
        if others.any():
            assert plan.weight[0, others].sum() == pytest.approx(1)


def test_without_contextual_tokens_the_rest_is_dropped():
    plan = VisionZip(contextual=0).plan(make_tokens(1, 10), 4)
    assert (plan.assign >= 0).sum() == 4


@pytest.mark.parametrize(
    ("num_keep", "split"),
    [(64, (54, 10)), (128, (108, 20)), (192, (162, 30)), (1, (1, 0)), (7, (6, 1))],
)
def test_published_split(num_keep, split):
    assert VisionZip().split_budget(num_keep) == split


def test_gradients_reach_what_was_folded():
    tokens = make_tokens(1, 12)
    x = tokens.vision_features.requires_grad_()
    plan = VisionZip(contextual=2).plan(tokens, 5)
    tokens.projector(merged(plan, x)).sum().backward()
    assert (x.grad.abs().sum(dim=-1) > 0).all()


def test_crops_merge_within_themselves_and_newlines_stay_themselves():
    crops = anyres(side=4, rows=2, cols=2)
    tokens = make_tokens(2, crops=crops)
    plan = VisionZip(contextual=2).plan(tokens, 8 + 25)
    slot_segment = crops.segment[plan.keep]  # [B, K]
    for b in range(2):
        assert torch.equal(slot_segment[b][plan.assign[b]], crops.segment)
    newlines = torch.where(crops.segment == -1)[0]
    assert torch.isin(newlines, plan.keep[0]).all()
    assert (plan.weight[:, newlines] == 1).all()
    assert len(plan.assign[0, newlines].unique()) == len(newlines)


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"contextual": -1}, {"contextual": 2.5}, {"scores": "max"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            VisionZip(**bad)
