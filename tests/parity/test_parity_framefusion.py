"""FrameFusion against its official code, call by call: layer c's input is its call c."""

import torch
from tests.methods.helpers import merged
from tests.parity.vectors import close, each_case

from vispress.methods import FrameFusion
from vispress.types import CropLayout, VisualTokens

LAYERS = 28
"""Of which the official budget is, whatever the model."""
ROWS = {1: "last", 4: "last_four"}


def layout_of(case):
    """Frames of a row of places, a newline behind each where the case has them."""
    patches, newline = case["param/patches"], case["param/newlines"]
    place = torch.tensor([*range(patches), *[-1] * newline])
    count = case["param/image_tokens"] // len(place)
    frame = torch.arange(count).repeat_interleave(len(place))
    col = place.repeat(count)
    segment = frame.masked_fill(col < 0, -1)
    return CropLayout(segment=segment, row=col.clamp(max=0), col=col)


def kept_by(case, call, index, memory):
    """The plan for what is left of the video, and its states: what the code has behind a call."""
    start, count = case["param/image_start"], case["param/image_tokens"]
    states = case["in/hidden_calls"][call, start + index]
    rows = case["in/attn_rows"][call - 1][None, ..., start + index] if call else None
    tokens = VisualTokens(
        features=states[None],
        index=index[None],
        num_original=count,
        num_entered=count,
        query_attention=rows if memory and memory[0].attention else None,
        crops=layout_of(case),
        depth=(call, LAYERS),
        memory=memory,
    )
    names = {"threshold": case["param/threshold"], "least": case["param/least"]}
    method = FrameFusion(
        keep_ratio=case["param/cost"], queries=ROWS[case["param/queries"]], **names
    )
    plan = method.plan(tokens, tokens.num_visual)
    x = states[None] if plan.assign is None else merged(plan, states[None])
    return plan, x[0]


@each_case("framefusion")
def test_keeps_and_merges_what_the_official_code_does(case):
    start, count = case["param/image_start"], case["param/image_tokens"]
    index, memory = torch.arange(count), ()
    for call in range(len(case["in/hidden_calls"])):
        official = [case[f"out/call{call}_{name}"] for name in ("positions", "hidden")]
        kind, finished = (case[f"out/call{call}_{name}"] for name in ("kind", "finished"))
        shares = case[f"out/call{call}_sparsity_f64"]
        video = (official[0] >= start) & (official[0] < start + count)
        expected = official[0][video] - start
        assert len(official[0]) - len(expected) == start + case["param/text_len"]
        if memory and memory[0].over:
            assert kind == "none"
            assert expected.tolist() == index.tolist()
            continue
        if kind == "prune" and case["param/newlines"]:  # ours stay, the code ranks them
            assert len(expected) == kept_by(case, call, index, memory)[0].counts[0]
            return
        plan, states = kept_by(case, call, index, memory)
        index, memory = index[plan.keep[0]], plan.memory
        tracker = memory[0].value
        if case["flag/ties"]:
            assert len(index) == len(expected)
            return
        assert index.tolist() == expected.tolist()
        close(states, official[1][video])
        assert finished.tolist() == [int(not tracker.merging or memory[0].over), memory[0].over]
        if kind == "merge" and not memory[0].over:
            # what each call left of what it saw
            left = torch.tensor([1.0, *tracker.shares], dtype=torch.float64)
            close(1 - left[1:] / left[:-1], shares)
