"""ToMe against its official code.

No encoder here has a distillation token, which that code protects beside [CLS]: its vectors are
met by the same parts, told that nothing may join the first odd token.
"""

import pytest
import torch
from tests.parity.vectors import close, each_case, load

from vispress.methods import ToMe
from vispress.methods._parts.clustering.bipartite import fold, match, schedule
from vispress.methods.base import descending
from vispress.methods.encoder_merger import EncoderTokens
from vispress.runtime.encoder.merging import size_bias
from vispress_kernels.assign_nearest import assign_nearest
from vispress_kernels.merge_tokens import merge_tokens


def new_places(metric, merges, cls):
    """Where each token of one layer goes, as the runtime asks for it; the count afterwards."""
    n = metric.shape[1]
    merges = min(merges, (n - int(cls)) // 2)
    tokens = EncoderTokens(
        keys=torch.stack([metric + 1, metric - 1], dim=1),  # two heads
        count=torch.full((len(metric),), n),
        merges=torch.full((len(metric),), merges),
        has_cls=cls,
    )
    return ToMe(num_tokens=1).fold(tokens), n - merges


def merged(x, size, places, count):
    """Means weighted by size, and the sizes of what comes out."""
    total = merge_tokens(size[..., None], places, count)[..., 0]
    return merge_tokens(x, places, count, weight=size, reduce="mean"), total


OURS = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name)
        for name, case in load("tome").items()
        if "out/node_max" in case and not case["param/distill_token"]
    ],
)


@OURS
def test_merges_what_the_official_code_merges(case):
    metric, cls = case["in/metric"], bool(case["param/class_token"])
    places, count = new_places(metric, case["param/r"], cls)
    assert metric.shape[1] - count == case["param/r_effective"]
    cosine, nearest = match(metric, torch.tensor([metric.shape[1]]), protect_first=cls)
    close(cosine.clamp(min=-1e30), case["out/node_max"])
    size = torch.ones(metric.shape[:2])
    x, total = merged(case["in/x"], size, places, count)
    assert (total.sum(dim=1) == metric.shape[1]).all()
    if case["flag/ties"]:
        return
    assert torch.equal(nearest[:, int(cls) :], case["out/node_idx"][:, int(cls) :])
    order = descending(cosine)
    r = case["param/r_effective"]
    assert torch.equal(order[:, :r], case["out/src_idx"])
    assert torch.equal(nearest.gather(1, order[:, :r]), case["out/dst_idx"])
    rest = order[:, r:].sort(dim=1).values if cls else order[:, r:]
    assert torch.equal(rest, case["out/unm_idx"])
    close(x, case["out/merged_wavg"])
    close(x, case["out/merged_mean"])  # all sizes are 1
    close(total, case["out/size"])
    source = torch.nn.functional.one_hot(places, count).mT
    assert torch.equal(source, case["out/source"].long())
    back = x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
    close(back, case["out/unmerged_wavg"])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name)
        for name, case in load("tome").items()
        if case.get("param/distill_token")
    ],
)
def test_a_distillation_token_stays_too(case):
    metric, x = case["in/metric"].clone(), case["in/x"]
    n, cls = metric.shape[1], bool(case["param/class_token"])
    r = min(case["param/r"], (n - int(cls) - int(case["param/distill_token"])) // 2)
    assert r == case["param/r_effective"]
    metric[:, 1] = float("nan")  # a NaN is never nearest
    cosine, nearest = match(metric, torch.tensor([n]), protect_first=cls)
    close(cosine.clamp(min=-1e30), case["out/node_max"])
    assert torch.equal(nearest[:, int(cls) :], case["out/node_idx"][:, int(cls) :])
    order = descending(cosine)
    assert torch.equal(order[:, :r], case["out/src_idx"])
    assert torch.equal(nearest.gather(1, order[:, :r]), case["out/dst_idx"])
    stays = order[:, r:].sort(dim=1).values if cls else order[:, r:]
    assert torch.equal(stays, case["out/unm_idx"])
    places = fold(cosine, nearest, torch.tensor([n]), torch.tensor([r]), n, in_order=cls)
    # [CLS] and the distillation token come first there; here all even tokens come before odd ones
    evens = stays.shape[1]
    theirs = [0, evens, *range(1, evens), *range(evens + 1, n - r)]
    for name in ("merged_wavg", "merged_mean"):
        ours, total = merged(x, torch.ones(x.shape[:2]), places, n - r)
        close(ours[:, theirs], case[f"out/{name}"])
    close(total[:, theirs], case["out/size"])
    source = torch.nn.functional.one_hot(places, n - r).mT[:, theirs]
    assert torch.equal(source, case["out/source"].long())


@each_case("tome", having="param/k")
def test_every_kth_token_takes_the_others_in(case):
    x, k = case["in/x"], case["param/k"]
    whole = x.shape[1] // k * k  # what does not fill a group is left out
    groups = case["in/metric"][:, :whole].unflatten(1, (-1, k))
    others, kth = groups[:, :, :-1].flatten(1, 2), groups[:, :, -1]
    nearest, _ = assign_nearest(others, kth)
    assert torch.equal(nearest, case["out/dst_idx"])
    own = torch.arange(kth.shape[1]).expand(len(x), -1)
    places = torch.cat([nearest.unflatten(1, (-1, k - 1)), own[..., None]], dim=2).flatten(1)
    ours, total = merged(x[:, :whole], torch.ones(len(x), whole), places, kth.shape[1])
    close(ours, case["out/merged_wavg"])
    close(total, case["out/size"])


@each_case("tome", having="param/r_per_layer")
def test_sizes_and_order_carry_over_layers(case):
    x, cls = case["in/x"], bool(case["param/class_token"])
    size = torch.ones(x.shape[:2])
    source = torch.arange(x.shape[1])[None]
    for metric, merges in zip(case["in/metric_per_layer"], case["param/r_per_layer"], strict=True):
        places, count = new_places(metric[None, : x.shape[1]], int(merges), cls)
        x, size = merged(x, size, places, count)
        source = places.gather(1, source)
    close(x, case["out/x"])
    close(size, case["out/size"])
    expected = case["out/source"].long()
    assert torch.equal(torch.nn.functional.one_hot(source, x.shape[1]).mT, expected)


@each_case("tome", having="out/attn_out")
def test_attention_weighs_keys_by_their_sizes(case):
    x, heads = case["in/x"], case["param/heads"]
    qkv = (x @ case["in/w_qkv"].mT).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    bias = size_bias(case["in/size"][..., 0])
    for mask, expected in ((bias, "out/attn_out"), (None, "out/attn_out_no_size")):
        out = torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask)
        close(out.transpose(1, 2).flatten(2), case[expected])
    close(qkv[1].mean(dim=1), case["out/metric"])


@each_case("tome", having="out/r_list")
def test_schedules_are_the_official_ones(case):
    ours = schedule(case["param/layers"], case["param/r"], case["param/inflection"])
    assert ours == case["out/r_list"].tolist()


def test_another_place_is_noticed():
    (case,) = (case for case in load("tome").values() if "param/r_per_layer" in case)
    metric = case["in/metric_per_layer"][:1]
    n = metric.shape[1]
    edges = match(metric, torch.tensor([n]), protect_first=True)
    args = torch.tensor([n]), torch.tensor([9]), n
    assert not torch.equal(fold(*edges, *args, in_order=True), fold(*edges, *args, in_order=False))
