"""VisPruner: attention and duplicate removal, by hand."""

import pytest
import torch
from tests.methods.helpers import make_tokens, only
from tests.methods.test_divprune import GOLDEN

from vispress.errors import ConfigError
from vispress.methods import VisPruner
from vispress.methods.diversity import largest_cosine, unit
from vispress.methods.vispruner import thin_out

ATTENTION = torch.tensor([[0.20, 0.05, 0.15, 0.02, 0.18, 0.10, 0.12, 0.18]])


def golden_tokens():
    return only(vision_features=GOLDEN[None], cls_attention=ATTENTION[:, None])


@pytest.mark.parametrize(("step", "kept"), [(1, [0, 2, 4, 6]), (8, [0, 2, 4, 5])])
def test_golden_vectors(step, kept):
    assert VisPruner(step=step).plan(golden_tokens(), 4).keep.tolist() == [kept]


def test_survivors_stand_in_descending_similarity_before_the_odd_ones():
    # even places 0, 2, 4 with cosines .8, 1, .6 to the nearest odd one; 2 is dropped
    x = torch.tensor([[[0.8, 0.6], [1, 0], [1, 0], [1, 0], [0.6, 0.8]]])
    assert thin_out(torch.arange(5)[None], x, 4, 1).tolist() == [[0, 4, 1, 3]]


def test_a_count_that_crashes_the_official_code_is_met():
    # 58 of 576: the rest is odd
    (keep,) = VisPruner().plan(make_tokens(1, 576), 58).keep
    assert len(keep.unique()) == 58


def test_attention_alone_and_duplicates_alone():
    tokens = make_tokens(1, 40)
    score = tokens.cls_attention.mean(dim=1)
    top = score[0].topk(9).indices.sort().values
    assert torch.equal(VisPruner(important_ratio=1.0).plan(tokens, 9).keep[0], top)
    ranked = score.argsort(descending=True)
    alone = thin_out(ranked, unit(tokens.vision_features), 9, 8).sort().values
    assert torch.equal(VisPruner(important_ratio=0.0).plan(tokens, 9).keep, alone)


def test_blocks_do_not_change_the_largest_cosine():
    x = unit(make_tokens(2, 50).features)
    ours = largest_cosine(x, x[:, :9], block=7)
    torch.testing.assert_close(ours, (x @ x[:, :9].mT).amax(dim=2))


@pytest.mark.refusal
def test_bad_hyper_parameters_are_refused():
    for bad in ({"step": 0}, {"important_ratio": 1.5}, {"scores": "max"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            VisPruner(**bad)
