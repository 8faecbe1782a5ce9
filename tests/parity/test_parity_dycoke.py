"""DyCoke against its official code: frames that are pruned, and what a decoding step sees."""

import torch
from tests.methods.helpers import only
from tests.parity.vectors import close, each_case, same_kept
from torch.nn import functional as F

from vispress.methods import DyCoke
from vispress.methods.cached_selector import Selection
from vispress.methods.dycoke import references


@each_case("dycoke", having="in/features")
def test_frames_are_pruned_as_in_the_official_code(case):
    x, size = case["in/features"], case["param/tokens_per_frame"]
    frames = len(x) // size
    tokens = only(features=x[None], grid=(frames, 1, size))
    (keep,) = DyCoke(pruned=case["param/merging_ratio"]).plan(tokens, len(x)).keep
    official = case["out/keep_sorted"]
    if frames % 2:  # the code loses an odd last frame, which stays whole here
        last = (frames - 1) * size
        assert keep[keep >= last].tolist() == list(range(last, len(x)))
        keep, official = keep[keep < last], official[official < last]
    by_frame = x.view(frames, size, -1)
    likeness = F.cosine_similarity(by_frame, by_frame[references(frames)[0]], dim=2).flatten()
    same_kept(case, keep, official, likeness)
    order = case["out/order"]
    assert sorted(order.tolist()) == case["out/keep_sorted"].tolist()
    assert torch.equal(case["out/tokens"], x[order])


def step(method, case, number, before):
    """The selection that a step leaves, as the runtime makes it of what the method chooses."""
    start, count = case["param/image_start"], case["param/image_tokens"]
    attention = case["in/attn_steps"][number].mean(dim=0)[None, start : start + count]
    selected = method.select_cached(attention, before)
    return Selection(
        visual=before.visual,
        num_keep=before.num_keep,
        attention=attention,
        selected=selected,
        begun=torch.tensor([True]),
    )


@each_case("dycoke", having="in/attn_steps")
def test_steps_see_what_they_see_in_the_official_code(case):
    start, count = case["param/image_start"], case["param/image_tokens"]
    method = DyCoke(decode_pruned=case["param/drop_ratio"], reference_quirks=True)
    few = method.decode_placement(28).budget.resolve(count)
    assert few == case["out/num_keep"]
    none, all_of_it = torch.zeros(1, count), torch.ones(1, count, dtype=torch.bool)
    now = Selection(
        visual=all_of_it,
        num_keep=torch.tensor([few]),
        attention=none,
        selected=all_of_it,
        begun=torch.tensor([False]),
    )
    for number, length in enumerate(case["out/cache_len"].tolist()):
        assert length == case["param/prompt_len"] + number + 1
        before, now = now, step(method, case, number, now)
        alike = F.cosine_similarity(now.attention, before.attention)
        close(alike, case["out/similarity"][number][None])
        chosen = bool(case["out/reselected"][number])
        assert chosen == (number == 0 or float(alike) < method.similarity)
        visible = case["out/visible_mask"][number].bool()
        assert visible[:length].logical_not().sum() == (count - few if chosen else 0)
        assert torch.equal(now.selected[0], visible[start : start + count])
        assert visible[:start].all()
        assert visible[start + count : length].all()
