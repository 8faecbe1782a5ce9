"""FastV against its official code."""

import math

import torch
from tests.methods.helpers import only
from tests.parity.vectors import close, each_case, same_kept

from vispress.methods import FastV


@each_case("fastv")
def test_keeps_what_the_official_code_keeps(case):
    start, length, layer = case["param/sys_len"], case["param/img_len"], case["param/K"]
    rows = case["in/attn_last_row"]
    ratio = case["param/ratio_r"]
    budget = (
        {"num_tokens": case["param/keep_count"]} if math.isnan(ratio) else {"keep_ratio": 1 - ratio}
    )
    method = FastV(layer=layer, **budget)
    (placement,) = method.placements(num_layers=max(len(rows), layer + 1))
    assert (placement.layer, placement.attention_of) == (layer, "previous")
    num_keep = placement.budget.resolve(length)
    assert num_keep == case["param/keep_count"]

    seen = rows[placement.layer - 1, :, start : start + length]
    tokens = only(query_attention=seen[None, :, None])
    score = method.score(tokens)[0]
    close(score, case["out/score"])
    (keep,) = method.plan(tokens, num_keep).keep
    same_kept(case, keep, case["out/keep_image_sorted_rel"], score)


@each_case("fastv")
def test_text_stays_and_positions_are_the_original_ones(case):
    start, length = case["param/sys_len"], case["param/img_len"]
    behind = torch.arange(start + length, start + length + case["param/text_len"])
    image = case["out/keep_image_sorted_rel"] + start
    whole = torch.cat([torch.arange(start), image, behind])
    assert FastV.default_positions == "original"
    assert whole.tolist() == case["out/keep_sorted"].tolist()
    assert whole.tolist() == case["out/position_ids_after"].tolist()
