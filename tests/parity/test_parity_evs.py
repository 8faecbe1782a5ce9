"""EVS against the code of vLLM."""

from tests.methods.helpers import only
from tests.parity.vectors import close, each_case

from vispress.methods import EVS
from vispress.methods.evs import dissimilarity


@each_case("evs")
def test_keeps_what_the_official_code_keeps(case):
    x, merge = case["in/video_embeds"][None], case["param/spatial_merge_size"]
    t, h, w = case["param/thw"].tolist()
    grid = (t, h // merge, w // merge)
    frame = grid[1] * grid[2]
    score = dissimilarity(x, frame) if t > 1 else EVS().score(only(features=x, grid=grid))
    close(score[0], case["out/dissimilarity"].flatten())
    (placement,) = EVS(keep_ratio=1 - case["param/q"]).placements(32)
    # the official code never keeps less than one frame
    num_keep = max(frame, placement.budget.resolve(x.shape[1]))
    assert num_keep == case["out/retain_count"]
    (keep,) = EVS().plan(only(features=x, grid=grid), num_keep).keep
    assert keep.tolist() == case["out/keep_sorted"].tolist()
    assert keep.tolist() == case["out/keep_mask"].flatten().nonzero()[:, 0].tolist()
