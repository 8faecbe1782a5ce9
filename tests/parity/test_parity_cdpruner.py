"""CDPruner against its official code, whose relevance is that of CLIP's two towers."""

import torch
from tests.parity.vectors import close, each_case

from vispress.methods.cdpruner import text_relevance
from vispress_kernels.dpp_select import dpp_select


@each_case("cdpruner")
def test_keeps_what_the_official_code_keeps(case):
    x, patches = case["in/image_features"], case["in/image_embeds"]
    B, N = x.shape[:2]
    # the crops of an image share one scale: one row of the bucket
    row = patches.flatten(0, 1)[None]
    counted = torch.ones(row.shape[:2], dtype=torch.bool)
    relevance = text_relevance(row, case["in/text_embeds"][None], counted, negate=True).view(B, N)
    close(relevance, case["out/relevance"])
    close(relevance.square(), case["out/kernel_diag"])
    order = dpp_select(x, relevance, case["param/keep_count"])
    assert order.tolist() == case["out/select_order"].tolist()
    kept = torch.zeros(B, N, dtype=torch.uint8).scatter(1, order, 1)
    assert torch.equal(kept, case["out/keep_mask"])
