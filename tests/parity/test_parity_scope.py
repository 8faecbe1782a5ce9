"""SCOPE against its official code."""

import pytest
import torch
from tests.methods.helpers import only
from tests.parity.vectors import close, load

from vispress.methods import SCOPE
from vispress.methods._parts.scoring.cosines import unit
from vispress.methods.scope import cover

PUBLISHED = [name for name, case in load("scope").items() if case["param/combine"] == "multi"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_keeps_what_the_official_code_keeps(name):
    case = load("scope")[name]
    x, attention = case["in/features"], case["in/cls_attn"][..., 1:]
    saliency, share = attention.sum(dim=1), case["param/keep_per_crop"]
    assert share == case["param/token_num"] // case["param/crops"]
    close(saliency, case["out/saliency"])
    similar = unit(x) @ unit(x).mT
    close(similar.clamp(min=0).sum(dim=1), case["out/first_gain"])
    order = cover(x, saliency, case["param/alpha"], share)
    if case["flag/ties"]:  # the last gains are rounding, or those of equal tokens
        assert order.shape == case["out/selected_order"].shape
        assert all(len(row.unique()) == share for row in order)
        return
    assert torch.equal(order, case["out/selected_order"])
    if share == x.shape[1]:  # everything: never asked of a method
        return
    tokens = only(vision_features=x, cls_attention=attention)
    keep = SCOPE(alpha=case["param/alpha"]).plan(tokens, share).keep
    assert torch.equal(keep, case["out/selected_sorted"])
    assert torch.equal(x.take_along_dim(keep[..., None], dim=1), case["out/tokens"])
