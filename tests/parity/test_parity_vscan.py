"""VScan's stage before the LLM against its official code."""

import torch
from tests.methods.helpers import merged, only
from tests.parity.vectors import close, each_case

from vispress.methods import VScan


@each_case("vscan")
def test_keeps_and_merges_what_the_official_code_does(case):
    x, near, far = (case[f"in/{name}"] for name in ("features", "attn_shallow", "attn_deep"))
    side, asked = 4 * case["param/window"], case["param/keep_count"]
    tokens = only(features=x, cls_attention=torch.stack([near, far], dim=1), grid=(1, side, side))
    official = case["out/keep_sorted"]
    assert torch.equal(case["out/keep_mask"].bool().nonzero()[:, 1].view_as(official), official)
    local = case["out/local_sorted"]
    if asked == side * side:  # everything: never asked of a method
        close(x, case["out/tokens"])
        return
    # the code loses what sixteen windows do not share out evenly
    assert official.shape[1] == asked - asked // 2 % 16
    assert local.shape[1] == asked // 2 - asked // 2 % 16
    for own, kept in zip(local.tolist(), official.tolist(), strict=True):
        assert set(own) <= set(kept)
    plan = VScan().plan(tokens, official.shape[1])
    assert plan.keep.tolist() == official.tolist()
    close(merged(plan, x), case["out/tokens"])
