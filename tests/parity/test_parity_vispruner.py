"""VisPruner against its official code."""

import torch
from tests.methods.helpers import only
from tests.parity.vectors import close, each_case, same_kept

from vispress.methods import VisPruner
from vispress.methods._parts.scoring.encoder_attention import encoder_attention


@each_case("vispruner")
def test_keeps_what_the_official_code_keeps(case):
    tokens = only(vision_features=case["in/features"], cls_attention=case["in/cls_attn"])
    num_keep, important = case["param/keep_count"], case["param/important_count"]
    assert num_keep - important == case["param/diverse_count"]
    method = VisPruner(important_ratio=case["param/important_ratio"])
    score = encoder_attention(tokens, "cls")
    close(score, case["out/score"])
    order = method.select(score, tokens.vision_features, num_keep)
    keep = method.plan(tokens, num_keep).keep
    for b in range(len(keep)):
        same_kept(case, keep[b], case["out/keep_sorted"][b], score[b])
        if not case["flag/ties"]:
            assert order[b].tolist() == case["out/selected_order"][b].tolist()
            assert order[b, :important].tolist() == case["out/important_desc"][b].tolist()
            assert order[b, important:].tolist() == case["out/residual_final"][b].tolist()
            assert torch.equal(case["out/keep_mask"][b].nonzero()[:, 0], keep[b])
