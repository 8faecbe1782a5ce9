"""SCM against the released code of Mini-Monkey."""

import torch
from tests.methods.helpers import only
from tests.parity.vectors import close, each_case

from vispress.methods import SCM


@each_case("scm")
def test_keeps_the_detail_that_the_official_code_keeps(case):
    start, count = case["param/detail_start"], case["param/detail_tokens"]
    tiles = case["param/tiles_w"] * case["param/tiles_h"]
    assert count == tiles * case["param/tile_tokens"] <= case["param/image_tokens"]
    rows = case["in/attn_rows"]
    # every position behind the detail asks
    assert rows.shape[1] == rows.shape[2] - start - count
    score = rows[..., start : start + count].mean(dim=(0, 1))
    close(score, case["out/score"])
    method = SCM(keep_ratio=case["param/keep_ratio"])
    (placement,) = method.placements(24)
    assert placement.probe == case["param/probe_layer"]
    official = case["out/keep_detail_sorted_rel"]
    assert placement.budget.resolve(count) == len(official)
    (keep,) = method.plan(only(mean_attention=score[None]), len(official)).keep
    assert keep.tolist() == official.tolist()
    # the first token behind the detail is lost in the code, which resumes one place too far
    lost = start + count
    assert case["out/dropped_text_position"] == lost
    behind = torch.arange(lost + 1, len(case["in/embeds"]))
    left = torch.cat([torch.arange(start), start + keep, behind])
    assert left.tolist() == case["out/keep_sorted"].tolist()
    close(case["in/embeds"][left], case["out/embeds_after"])
