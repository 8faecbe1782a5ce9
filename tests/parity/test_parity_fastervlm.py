"""FasterVLM against its official code."""

import torch
from tests.methods.helpers import anyres, only
from tests.parity.vectors import close, each_case, same_kept

from vispress.methods import FasterVLM


def feature_attention(case):
    """Attention of the layer that `select_layer` names, by the method's own choice: `[B, H, N]`."""
    layers = case["in/cls_attn_all_layers"]
    (layer,) = FasterVLM().encoder_layers(len(layers), len(layers) + case["param/select_layer"])
    return layers[layer][..., 1:]


@each_case("fastervlm", having="out/keep_sorted")
def test_keeps_what_the_official_code_keeps(case):
    attention = feature_attention(case)
    tokens = only(cls_attention=attention, features=case["in/hidden_pen"][:, 1:])
    num_keep = case["param/keep_count"]
    method = FasterVLM(num_tokens=num_keep)
    score = method.score(tokens)
    close(score, case["out/score"])
    keep = method.plan(tokens, num_keep).keep
    for b, kept in enumerate(keep):
        same_kept(case, kept, case["out/keep_sorted"][b], score[b])
        if not case["flag/ties"]:
            assert torch.equal(tokens.features[b, kept], case["out/features_kept"][b])


@each_case("fastervlm", having="param/grid_w")
def test_anyres_keeps_each_crop_s_share_in_picture_order(case):
    side, rows, cols = (case[f"param/{key}"] for key in ("side", "grid_h", "grid_w"))
    crops = anyres(side, rows, cols, newlines=False)
    # our place -> the official (crop, token)
    official = crops.segment * side * side + crops.row * side + crops.col
    attention = feature_attention(case).transpose(0, 1).flatten(1)  # [H, crops * N]
    tokens = only(cls_attention=attention[None][..., official], crops=crops)
    num_keep = case["param/keep_count"] * len(case["out/score"])
    (keep,) = FasterVLM(num_tokens=num_keep).plan(tokens, num_keep).keep
    assert official[keep].tolist() == case["out/order_crop_token"].tolist()
    values = case["in/hidden_pen"][:, 1:].flatten(0, 1)
    assert torch.equal(values[official[keep]], case["out/features_out"])
