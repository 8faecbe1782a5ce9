"""GlobalCom2 against its official code."""

import torch
from tests.methods.helpers import anyres
from tests.parity.vectors import close, each_case

from vispress.methods import GlobalCom2
from vispress.methods._parts.geometry.crops import cut_of, resized
from vispress.methods.globalcom2 import crop_scales


def layout_of(case):
    """The layout of what the official unpadding leaves: symmetric rows or columns are gone."""
    side, rows, cols = (case[f"param/{k}"] for k in ("side", "grid_h", "grid_w"))
    mask = case["out/unpad_mask"].bool().view(rows, cols, side, side).transpose(1, 2)
    picture = mask.reshape(rows * side, cols * side)
    top = int((~picture.any(dim=1)).sum()) // 2
    left = int((~picture.any(dim=0)).sum()) // 2
    return anyres(side, rows, cols, top=top, left=left)


@each_case("globalcom2", having="out/crop_scales_f64")
def test_keeps_what_the_official_code_keeps(case):
    layout = layout_of(case)
    cut, segment, side = cut_of(layout), layout.segment, case["param/side"]
    assert (cut.rows, cut.cols) == (case["param/grid_h"], case["param/grid_w"])
    assert [len(places) for places in cut.places] == case["out/valid_per_crop"].tolist()
    ratio, temperature = case["param/retention_ratio"], case["param/temperature"]
    all_scores = case["in/cls_scores"]
    thumbnail = all_scores[0].view(1, side, side)
    scales = crop_scales(thumbnail, cut, ratio, temperature)
    close(scales[0], case["out/crop_scales_f64"])
    shared = resized(thumbnail, cut)[0]
    close(torch.cat([shared[places] for places in cut.places]), case["out/interpolated_global"])
    score = all_scores[segment.clamp(min=0), layout.row * side + layout.col][None]
    rank = GlobalCom2(temperature=temperature).surplus(score, segment, cut, ratio)[0]
    kept = (rank < 0) & (segment >= 0)
    assert kept[segment == 0].nonzero()[:, 0].tolist() == sorted(case["out/thumb_desc"].tolist())
    crops = torch.where(segment > 0)[0]
    official = torch.split(case["out/kept_desc_within_valid"], case["out/kept_per_crop"].tolist())
    for places, theirs in zip(cut.places, official, strict=True):
        assert kept[crops[places]].nonzero()[:, 0].tolist() == sorted(theirs.tolist())


@each_case("globalcom2", having="out/cls_scores_logits")
def test_scores_are_means_of_logits(case):
    heads, width = case["param/heads"], case["param/head_dim"]
    q, k = (
        (case["in/hidden"] @ case[f"in/{w}"].mT).unflatten(-1, (heads, width)).transpose(1, 2)
        for w in ("w_q", "w_k")
    )
    logits = q[:, :, :1] @ k.mT * width**-0.5
    close(logits[:, :, 0, 1:].mean(dim=1), case["out/cls_scores_logits"])
