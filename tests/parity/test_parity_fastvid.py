"""FastVID against both of its official files, given the frame features and attention they read."""

import torch
from tests.parity.vectors import close, each_case

from vispress.methods import FastVID
from vispress.methods._parts.video.frames import Frames
from vispress.methods._parts.video.scenes import adjacent_cosine, dynamic_scenes


def method_of(case):
    return FastVID(
        retained=case["param/retention_ratio"],
        variant=case["param/variant"],
        scenes=case["param/scenes"],
        # the code takes thresholds that no cosine can have
        threshold=max(-1.0, min(1.0, case["param/tau"])),
        context=case["param/context"],
        anchor_step=case["param/anchor_step"],
        alpha=case["param/alpha"],
    )


def frames_of(case):
    """Where frames and newlines of rows (none for `width` 0) lie."""
    number, size, _ = case["in/features"].shape
    width = case["param/width"]
    if not width:
        return Frames(torch.arange(number * size).view(number, size), torch.arange(0))
    rows = torch.arange(number * (size // width) * (width + 1)).view(number, -1, width + 1)
    return Frames(rows[..., :width].flatten(1), rows[..., width].flatten())


@each_case("fastvid")
def test_keeps_and_merges_what_the_official_code_does(case):
    x, method, video = case["in/features"], method_of(case), frames_of(case)
    cosine = adjacent_cosine(case["in/frame_features"][None])[0]
    close(cosine, case["out/adjacent_cosine"])
    threshold = case["param/tau"]
    scenes = dynamic_scenes(cosine.tolist(), method.scenes, threshold)
    assert [end - start for start, end in scenes] == case["out/segment_sizes"].tolist()
    official = case["out/keep_image_sorted_rel"]
    total = video.places.numel() + len(video.newlines)
    values, keep = method.kept(x, case["in/attention"], scenes, video, total, "torch")
    assert len(keep) == len(official)
    start = case["param/video_start"]
    text = torch.arange(case["param/text_len"]) + start + total
    sequence = torch.cat([torch.arange(start), official + start, text])
    assert case["out/keep_sorted"].tolist() == sequence.tolist()
    if case["flag/ties"]:
        return
    assert keep.tolist() == official.tolist()
    whole = torch.zeros(total, x.shape[2]).index_copy(
        0, video.places.flatten(), values.flatten(0, 1)
    )
    if len(video.newlines):
        whole[video.newlines] = case["in/newline"]
    close(whole[keep], case["out/tokens"])
