"""FlashVLM against its official code."""

from tests.methods.helpers import only
from tests.parity.vectors import close, each_case

from vispress.methods import FlashVLM


@each_case("flashvlm")
def test_keeps_what_the_official_code_keeps(case):
    x = case["in/vision_features"]
    projected, text = x @ case["in/projector"], case["in/text_embeds"]
    if not case["param/with_text"]:
        text = text[:, :0]
    tokens = only(
        features=projected,
        vision_features=x,
        cls_attention=case["in/cls_attn"],
        text_embeddings=text,
    )
    official, count = case["out/keep_sorted"], case["param/keep_count"]
    assert official.shape[1] == count
    kept = projected.gather(1, official[..., None].expand(-1, -1, projected.shape[2]))
    close(kept, case["out/tokens"])
    method = FlashVLM(eta=case["param/eta"])
    if count == x.shape[1]:  # everything: never asked of a method
        return
    keep = method.plan(tokens, count).keep
    assert keep.shape == official.shape
    if not case["flag/ties"]:
        assert keep.tolist() == official.tolist()
