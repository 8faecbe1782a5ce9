"""PruneVid against its official code: scenes, clusters, and the stage inside the LLM."""

import torch
from tests.methods.helpers import merged, only
from tests.parity.vectors import close, each_case

from vispress.methods import PruneVid
from vispress.methods._parts.clustering.density_peaks import dpc_clusters
from vispress.methods._parts.video.groups import shares
from vispress.methods._parts.video.scenes import refined, scenes_of
from vispress.methods.prunevid import NEIGHBOURS, top_of_groups


@each_case("prunevid", having="in/labels")
def test_runs_grow_with_what_joins_them(case):
    rows = case["in/labels"].tolist()
    assert [refined(row) for row in rows] == case["out/refined"].tolist()


def partition(labels):
    """Numbers by first occurrence."""
    first = {}
    return [first.setdefault(label, len(first)) for label in labels]


@each_case("prunevid", having="in/features")
def test_scenes_and_counts_of_groups(case):
    x = case["in/features"][None]
    assert case["param/neighbours"] == NEIGHBOURS
    method = PruneVid(
        scenes=case["param/scene_ratio"],
        threshold=case["param/tau"],
        merged=case["param/cluster_ratio"],
    )
    labels = case["out/frame_labels"].tolist()
    count = max(1, int(x.shape[1] * method.scenes))
    _, found = dpc_clusters(x.mean(dim=2), count, neighbours=NEIGHBOURS)
    assert partition(found[0].tolist()) == partition(labels)
    assert refined(labels) == case["out/refined_labels"].tolist()
    scenes = scenes_of(refined(labels))
    assert [end - start for start, end in scenes] == case["out/window_sizes"].tolist()
    (groups,) = method.groups(x)
    counts = shares(groups, x.shape[1] * x.shape[2], method.merged)
    for name, static in (("static", True), ("dynamic", False)):
        of_scenes = [
            sum(
                number
                for group, number in zip(groups, counts, strict=True)
                if group.static is static and start <= group.frame < end
            )
            for start, end in scenes
        ]
        assert of_scenes == case[f"out/{name}_sizes"].tolist()
    # the code's rows are in the order of its ranking, so each is looked for among ours
    tokens = only(features=x.flatten(1, 2), grid=(x.shape[1], 1, x.shape[2]))
    plan = method.plan(tokens, tokens.num_visual)
    official = case["out/tokens"]
    ours = merged(plan, tokens.features)[0]
    assert len(ours) == len(official)
    nearest = torch.cdist(official.double(), ours.double()).argmin(dim=1)
    assert len(nearest.unique()) == len(ours)
    close(ours[nearest], official)


@each_case("prunevid", having="in/attn_text_rows")
def test_the_stage_inside_the_llm(case):
    start, number, group = case["param/image_start"], 0, []
    for static, dynamic, frames in zip(
        *(case[f"param/{name}_sizes"].tolist() for name in ("static", "dynamic", "window")),
        strict=True,
    ):
        for size in (static, *[dynamic // frames] * frames):
            group += [number] * size
            number += 1
    rows = case["in/attn_text_rows"]
    assert rows.shape[1] == case["param/text_len"]
    score = rows[..., start : start + len(group)].amax(dim=(0, 1))
    close(score, case["out/score"])
    keep = top_of_groups(score, torch.tensor(group), case["param/alpha"], len(group))
    assert keep.tolist() == case["out/keep_image_sorted_rel"].tolist()
