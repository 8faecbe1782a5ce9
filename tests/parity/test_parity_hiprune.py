"""HiPrune against its official code, which on Qwen can choose one token twice."""

import torch
from tests.methods.helpers import only
from tests.parity.vectors import close, each_case, same_kept

from vispress.methods import HiPrune


def keep_of(case, middle, deep, num_keep):
    """What one picture keeps, its layers' scores given as `[N]`."""
    grid = (1, len(middle) // case["param/width"], case["param/width"])
    if num_keep == len(middle):  # everything: never asked of a method
        return torch.arange(num_keep)
    tokens = only(column_attention=torch.stack([middle, deep])[None, :, None], grid=grid)
    return HiPrune(alpha=case["param/alpha"]).plan(tokens, num_keep).keep[0]


def anchors_are(case, middle, num_keep):
    """Whether the official anchors are the highest, and as many as ours."""
    official = case["out/anchors_desc"]
    assert official.shape[-1] == round(num_keep * case["param/alpha"] / 5)
    for score, own in zip(middle, official, strict=True):
        assert case["flag/ties"] or score.topk(len(own)).indices.tolist() == own.tolist()


@each_case("hiprune", having="in/attn_two_rows")
def test_keeps_what_the_official_code_keeps(case):
    rows, values = case["in/attn_two_rows"], case["in/features"]
    N, layer = rows.shape[-1] - 1, case["param/object_layer"] - 1  # counted from 1 there
    # the mean over all rows: [CLS], and each of the patches
    columns = ((rows[..., 0, :] + N * rows[..., 1, :]) / (N + 1)).mean(dim=2)[..., 1:]
    layers = HiPrune(object_layer=layer).encoder_layers(
        len(columns), len(columns) + case["param/select_layer"]
    )
    middle, deep = columns[layers[0]], columns[layers[-1]]
    close(middle, case["out/object_score"])
    close(deep, case["out/deep_score"])
    share = case["out/keep_per_crop"]
    assert share == case["param/retention"] // case["param/crops"]
    anchors_are(case, middle, share)
    kept = []
    for b, official in enumerate(case["out/keep_sorted"]):
        keep = keep_of(case, middle[b], deep[b], share)
        same_kept(case, keep, official, deep[b])
        kept.append(values[b, keep])
    if not case["flag/ties"]:
        assert torch.equal(torch.cat(kept), case["out/features_kept"])


def scores_of(case):
    """Scores of merged tokens in raster order, of the object layer and the last: `[2, N]`."""
    if "in/token_scores" in case:
        return case["in/token_scores"]
    maps, order = case["in/attn_maps"].mean(dim=1), case["in/window_index"]
    merged = maps.sum(dim=1).view(2, -1, 4).mean(dim=2)
    return merged[:, order.argsort()]


@each_case("hiprune", having="param/retain_ratio")
def test_keeps_all_that_the_port_keeps(case):
    middle, deep = scores_of(case)
    close(middle, case["out/object_score"].flatten())
    close(deep, case["out/deep_score"].flatten())
    asked, layer = case["out/requested_count"], case["param/object_layer"] - 1
    assert HiPrune(object_layer=layer).encoder_layers(32, 31) == (15, 31)
    assert asked == round(case["param/tokens"] * case["param/retain_ratio"])
    anchors_are(case, middle[None], asked)
    keep, (official,) = keep_of(case, middle, deep, asked), case["out/keep_sorted"]
    assert len(keep) == asked
    assert case["out/kept_count"] == len(official)
    assert set(official.tolist()) <= set(keep.tolist())
    if len(official) == asked:
        assert keep.tolist() == official.tolist()
