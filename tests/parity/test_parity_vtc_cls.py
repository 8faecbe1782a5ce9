"""VTC-CLS against its official code."""

import torch
from tests.methods.helpers import only
from tests.parity.vectors import close, each_case, same_kept

from vispress.methods import VTCCLS


@each_case("vtc_cls")
def test_keeps_what_the_official_code_keeps(case):
    rows, num_keep = case["in/cls_attn_all_layers"][..., 1:], case["param/keep_count"]
    assert len(rows) == case["param/n_layers"]
    method = VTCCLS(start_layer=case["param/start_layer"], num_tokens=num_keep)
    layers = method.encoder_layers(len(rows), feature_layer=len(rows) - 2)
    attention = rows[list(layers)]  # [E, H, N]
    tokens = only(
        cls_attention=attention if len(layers) == 1 else attention[None],
        features=case["in/hidden_pen"][None, 1:],
    )
    score = method.score(tokens)[0]
    close(score, case["out/score"])
    (keep,) = method.plan(tokens, num_keep).keep
    same_kept(case, keep, case["out/keep_sorted"], score)
    if not case["flag/ties"]:
        assert torch.equal(tokens.features[0, keep], case["out/features_kept"])
