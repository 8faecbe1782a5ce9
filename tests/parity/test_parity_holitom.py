"""HoliTom against its official code: cuts, counts, clusters, and the stage inside the LLM."""

import torch
from tests.methods.helpers import merged, only
from tests.parity.vectors import close, each_case

from vispress.methods import HoliTom
from vispress.methods._parts.video.groups import saving_groups
from vispress.methods._parts.video.scenes import adjacent_cosine, saving_scenes
from vispress.methods.holitom import NEIGHBOURS, retained_counts, share_of_left


def method_of(case):
    assert case["param/neighbours"] == NEIGHBOURS
    return HoliTom(
        retained=case["param/retain_ratio"],
        threshold=case["param/tau"],
        beta=case["param/beta"],
        max_window=case["param/max_window_size"],
    )


@each_case("holitom", having="in/features")
def test_cuts_and_counts(case):
    x, method = case["in/features"][None], method_of(case)
    same = adjacent_cosine(x)[0] > method.threshold
    assert torch.equal(same, case["out/adjacent_same"].bool())
    scenes, saved = saving_scenes(same, method.max_window)
    assert [[start, end - 1] for start, end in scenes] == case["out/segments"].tolist()
    assert saved == case["out/total_saved"]
    (groups,) = saving_groups(x, method.threshold, method.max_window)
    total = x.shape[1] * x.shape[2]
    counts = retained_counts(groups, total, method.retained)
    share = share_of_left(method.retained, total - saved, total)
    assert abs(share - case["out/retain_ratio_adjusted_f64"]) < 1e-12
    static, each = case["out/static_kept"].tolist(), case["out/dynamic_kept_per_frame"].tolist()
    found = {(group.frame, group.static): n for group, n in zip(groups, counts, strict=True)}
    for (start, end), averages, others in zip(scenes, static, each, strict=True):
        assert found.get((start, True), 0) == averages
        assert [found.get((frame, False), 0) for frame in range(start, end)] == [others] * (
            end - start
        )


def rows_of(case, size):
    """Places of the official rows in the video, and their values, in raster order.

    With newlines rows are in that order, and a newline stands behind each row of the grid.
    """
    rows = case["out/tokens"]
    if case["param/newline"] == "grid":
        return None, rows[(rows != case["in/newline"]).any(dim=1)]
    places = case["out/row_frame"] * size + case["out/row_place"]
    assert len(places.unique()) == len(places)
    order = places.argsort()
    # averages stand in the first frame of their run
    starts = set(case["out/segments"][:, 0].tolist())
    static = case["out/row_static"].bool()
    assert set(case["out/row_frame"][static].tolist()) <= starts
    return places[order], rows[order]


@each_case("holitom", having="in/features")
def test_keeps_and_merges_what_the_official_code_does(case):
    x = case["in/features"]
    frames, size, _ = x.shape
    tokens = only(
        features=x.flatten(0, 1)[None],
        column_attention=case["in/attention"].flatten()[None, None],
        grid=(frames, 1, size),
    )
    plan = method_of(case).plan(tokens, frames * size)
    places, values = rows_of(case, size)
    assert plan.counts == (len(values),)
    if case["flag/ties"]:
        return
    if places is not None:
        assert plan.keep[0].tolist() == places.tolist()
    close(merged(plan, tokens.features)[0], values)


@each_case("holitom", having="in/hidden")
def test_the_inner_stage(case):
    start, count = case["param/image_start"], case["param/image_tokens"]
    span = slice(start, start + count)
    rows = case["in/attn_last_row"][None, :, None, span]
    tokens = only(features=case["in/hidden"][None, span], query_attention=rows)
    close(rows.mean(dim=(1, 2))[0], case["out/score"])
    keep = case["out/keep_image_sorted_rel"]
    assert len(keep) == round(count * (1 - case["param/drop_ratio"]))
    plan = HoliTom(keep_ratio=0.5, inner=True).plan(tokens, len(keep))
    assert plan.keep[0].tolist() == keep.tolist()
    if case["param/drop_ratio"] == 0.5:
        assert HoliTom(inner=True).plan(tokens, count).counts == (len(keep),)
    behind = case["out/hidden_after"][start : start + len(keep)]
    close(merged(plan, tokens.features)[0], behind)
