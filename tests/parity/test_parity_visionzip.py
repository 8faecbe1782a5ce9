"""VisionZip against its official code; [CLS], which it forwards and we do not, is left out."""

from dataclasses import replace

import torch
from tests.methods.helpers import make_tokens, merged, only
from tests.parity.vectors import close, each_case

from vispress.methods import VisionZip
from vispress.types import CropLayout


def bucket(case):
    hidden, metric = case["in/hidden"][:, 1:], case["in/metric"][:, 1:]
    return only(
        vision_features=hidden,
        cls_attention=case["in/cls_attn"][..., 1:],
        vision_keys=metric[:, None],
    )


@each_case("visionzip", having="out/score_sum_heads")
def test_merges_what_the_official_code_merges(case):
    dominant, contextual = case["param/dominant_without_cls"], case["param/contextual"]
    tokens, num_keep = bucket(case), dominant + contextual
    method = VisionZip(num_tokens=num_keep, contextual=contextual)
    assert method.split_budget(num_keep) == (dominant, contextual)
    score = tokens.cls_attention.mean(dim=1)
    close(score * tokens.cls_attention.shape[1], case["out/score_sum_heads"])
    plan = method.plan(tokens, num_keep)
    assert plan.merge_on == "vision_features"
    values = merged(plan, tokens.vision_features)
    for b, keep in enumerate(plan.keep):
        top = case["out/dominant_sorted"][b, 1:] - 1
        if case["flag/ties"]:
            ours = score[b].sort(descending=True).values[:dominant]
            close(ours, score[b, top].sort(descending=True).values)
            continue
        # positions count [CLS]
        targets = case["out/contextual_target_positions"][b] - 1
        assert keep.tolist() == sorted(top.tolist() + targets.tolist())
        others = case["out/merged_positions"][b] - 1
        slots = {n: slot for slot, n in enumerate(keep.tolist())}
        expected = [slots[targets[a].item()] for a in case["out/assign"][b].tolist()]
        assert plan.assign[b, others].tolist() == expected
        counts = case["out/counts_clamped"][b][case["out/assign"][b]]
        close(plan.weight[b, others], 1 / counts)
        order = [slots[n] for n in top.tolist() + targets.tolist()]
        close(values[b, order], case["out/tokens"][b, 1:])


@each_case("visionzip", having="in/w_k")
def test_metric_is_the_mean_of_the_heads_keys(case):
    hidden, heads = case["in/hidden"], case["param/heads"]
    keys = (hidden @ case["in/w_k"].mT).unflatten(-1, (heads, -1)).transpose(1, 2)
    # through the plan: the same choices from all heads as from the official mean
    tokens = make_tokens(1, hidden.shape[1])
    ours = VisionZip(contextual=3).plan(replace(tokens, vision_keys=keys), 5)
    official = VisionZip(contextual=3).plan(
        replace(tokens, vision_keys=case["out/metric"][:, None]), 5
    )
    close(keys.mean(dim=1), case["out/metric"])
    assert torch.equal(ours.assign, official.assign)


@each_case("visionzip", having="in/tokens_per_crop")
def test_anyres_dominant_tokens_come_in_picture_order(case):
    crops, rows, cols = len(case["in/all_indices"]), case["param/grid_h"], case["param/grid_w"]
    assert crops == rows * cols  # no thumbnail in this function
    side, dominant = 24, case["param/dominant_without_cls"]  # 24 is fixed in the official code
    picture = torch.arange(rows * side)[:, None], torch.arange(cols * side)
    segment = (picture[0] // side * cols + picture[1] // side).flatten()
    row, col = (p.flatten() % side for p in torch.broadcast_tensors(*picture))
    layout = CropLayout(segment=segment, row=row, col=col)
    ranked = case["in/all_indices"][:, 1:] - 1  # descending score
    score = torch.zeros(crops, side * side).scatter(
        1, ranked, torch.arange(dominant, 0, -1).float().expand(crops, -1)
    )
    place = row * side + col
    attention = score[segment, place][None, None]
    tokens = only(
        cls_attention=attention, vision_keys=attention[..., None].contiguous(), crops=layout
    )
    num_keep = crops * dominant
    (keep,) = VisionZip(contextual=0).plan(tokens, num_keep).keep
    sorted_places = ranked.sort(dim=1).values
    nth = [
        torch.searchsorted(sorted_places[s], p).item()
        for s, p in zip(segment[keep], place[keep], strict=True)
    ]
    ours = case["in/tokens_per_crop"][segment[keep], 1 + torch.tensor(nth)]
    assert torch.equal(ours, case["out/tokens_out"][:num_keep])
