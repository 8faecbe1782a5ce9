"""DART against a third-party port of it (LightCompress)."""

from tests.parity.vectors import each_case

from vispress.methods._parts.scoring.cosines import unit
from vispress.methods.base import descending
from vispress.methods.dart import pull


@each_case("dart_port")
def test_keeps_what_the_port_keeps(case):
    start, n, words = (case[f"param/{k}"] for k in ("image_start", "image_tokens", "text_after"))
    norms = case["in/key_states"].abs().sum(dim=(0, 2))[None]
    own = descending(norms[:, start : start + n])[:, : case["param/pivot_image"]]
    text = descending(norms[:, start + n : start + n + words])[:, : case["param/pivot_text"]]
    assert (own[0] + start).tolist() == case["out/image_pivots_desc"].tolist()
    assert (text[0] + start + n).tolist() == case["out/text_pivots_desc"].tolist()
    # the port's pivots take turns in the order of a set
    order, states = case["out/pivot_processing_order"], unit(case["in/normed_hidden"][None])
    assert set(order.tolist()) == {*(own[0] + start).tolist(), *(text[0] + start + n).tolist()}
    share = int(n * (1 - case["param/reduction_ratio"]) / len(order))
    assert share == case["out/per_pivot"]
    image = slice(start, start + n)
    (kept,) = pull(states[:, image], states[:, order], own, [share] * len(order))
    assert sorted((kept + start).tolist()) == case["out/retained_sorted"].tolist()
    assert len(kept.unique()) == len(case["out/retained_as_returned"])
