"""MMTok against its official code, whose words are given."""

import torch
from tests.methods.helpers import only
from tests.parity.vectors import close, each_case

from vispress.methods import MMTok
from vispress.methods._parts.scoring.cosines import unit
from vispress.methods.mmtok import Spread


@each_case("mmtok", having="in/features")
def test_keeps_what_the_official_code_keeps(case):
    x, seen, words = (case[f"in/{name}"][None] for name in ("features", "vision_features", "text"))
    N, num_keep = x.shape[1], case["param/target"]
    padding = torch.zeros(1, N).index_fill(1, case["in/excluded"].long(), 1.0)
    method = MMTok(
        alpha=case["param/alpha"],
        text_temperature=case["param/tv_temp"],
        image_temperature=case["param/vv_temp"],
    )
    u = unit(seen)
    spreads = (
        Spread(unit(words), unit(x), method.text_temperature, 1 / words.shape[1]),
        Spread(u, u, method.image_temperature, method.alpha / N),
    )
    gain = sum(s.given(slice(None), None, s.totals()).sum(dim=2) for s in spreads)
    close(gain[0], case["out/first_gain"])
    tokens = only(
        features=x,
        vision_features=seen,
        text_embeddings=words,
        text_after=words.shape[1],
        padding=padding,
    )
    (keep,) = method.plan(tokens, num_keep).keep
    if case["flag/ties"]:  # equal tokens
        assert len(keep.unique()) == len(case["out/keep_sorted"])
        return
    assert keep.tolist() == case["out/keep_sorted"].tolist()
    assert torch.equal(x[0, keep], case["out/tokens"])
