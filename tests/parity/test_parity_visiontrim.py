"""VisionTrim against its official code, whose text is that of CLIP's tower."""

import torch
from tests.parity.vectors import close, each_case

from vispress.methods import VisionTrim
from vispress.methods._parts.scoring.cosines import unit
from vispress.methods.visiontrim import ROUNDS, chosen, dominance


@each_case("visiontrim", having="in/hidden")
def test_keeps_and_merges_what_the_official_code_does(case):
    x, attention = case["in/hidden"][:, 1:], case["in/attn"].mean(dim=1)
    patches, N = attention[:, 1:, 1:], case["param/side"] ** 2
    others = (patches.sum(dim=1) - patches.diagonal(dim1=1, dim2=2)) / (N - 1)
    metric = dominance(attention[:, 0, 1:], others)
    close(metric, case["out/metric"])
    text, tower = unit(case["in/text_projected"]), case["in/visual_projection"]
    scale = torch.tensor(case["param/logit_scale_log"]).exp().float()
    counts = case["param/dominant"], case["param/complement"]
    assert VisionTrim(complement=counts[1]).split_budget(sum(counts)) == counts
    assert case["param/iterations"] == ROUNDS
    first, target, y = chosen(x, metric, lambda z: scale * unit(z @ tower.mT) @ text.mT, counts)
    assert torch.equal(first, case["out/dominant_sorted"])
    assert torch.equal(target, case["out/complement_sorted"])
    kept = x.take_along_dim(first[..., None], dim=1)
    close(torch.cat([kept, y], dim=1), case["out/tokens"])
