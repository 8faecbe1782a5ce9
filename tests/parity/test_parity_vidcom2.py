"""VidCom2 against its official code."""

from tests.methods.helpers import only
from tests.parity.vectors import close, each_case

from vispress.methods import VidCom2
from vispress.methods._parts.scoring.cosines import unit
from vispress.methods.vidcom2 import frame_ratios, nearness, scores, steady_channels


@each_case("vidcom2")
def test_scores_and_shares_of_frames(case):
    x = steady_channels(case["in/features"][None])
    token, frame = scores(x)
    video = nearness(unit(x), unit(x).mean(dim=(1, 2), keepdim=True))
    close(video[0], case["out/video_score"])
    close(token[0] - video[0], case["out/frame_score"])
    ratios = frame_ratios(frame, case["param/base_scale"], VidCom2().temperature)
    close(ratios[0], case["out/frame_ratio"])
    size = x.shape[2]
    counts = [max(1, round(ratio * size)) for ratio in case["out/frame_ratio"].tolist()]
    assert counts == case["out/kept_per_frame"].tolist()


@each_case("vidcom2")
def test_keeps_what_the_official_code_keeps_at_its_count(case):
    x, official = case["in/features"], case["out/keep_sorted"]
    frames, size, _ = x.shape
    tokens = only(features=x.flatten(0, 1)[None], grid=(frames, 1, size))
    assert len(official) == int(case["out/kept_per_frame"].sum())
    if len(official) == frames * size:
        return
    (keep,) = VidCom2().plan(tokens, len(official)).keep
    assert keep.bincount(minlength=0).max() == 1
    if not case["flag/ties"]:
        assert keep.tolist() == official.tolist()
    order = case["out/order"]
    if case["param/layout"] == "plain":
        assert order.sort().values.tolist() == official.tolist()
        close(x.flatten(0, 1)[order], case["out/tokens"])
    else:  # newlines stand behind a frame's tokens there, not behind their rows
        close(case["in/features_with_newlines"][order], case["out/tokens"])
