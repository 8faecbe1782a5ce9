"""Debiasing against the patched official code of FastV and PyramidDrop."""

import torch
from tests.methods.helpers import only
from tests.parity.stages import attention_rows, drop, image_part, outputs, sequence_length
from tests.parity.vectors import close, each_case, same_kept

from vispress.adapters.padding import share_outside
from vispress.methods import Debias, FastV, PyramidDrop
from vispress.methods._parts.geometry.padding import THRESHOLDS, padding_mask
from vispress.methods._parts.scoring.trend import FASTV_CURVE, SLOPES

EXPONENTIAL_TO = 1e-4
"""Weights nearer than this to an exponential through their ends are one."""


def inside(size, side, cells):
    """`[1, cells]`: how much of each row of cells a picture of `size` covers, centred on `side`."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * side / cells
    start = (side - size) / 2
    return edges.clamp(start, start + size).diff()[None] * cells / side


def padding_of(width, height, cells):
    """Share of each patch that is padding, `[1, cells * cells]`; None for an unknown size."""
    if width < 0:
        return None
    side = max(width, height)
    return share_outside(inside(height, side, cells), inside(width, side, cells)).flatten(1)


def trend_of(weight):
    """The trend that official weights stand for: a slope, or a cubic (one over them)."""
    size, weight = len(weight), weight.double()
    slope = float(-weight[-1].log() * size / (size - 1))
    x = torch.arange(size, dtype=torch.float64)
    if (torch.exp(-slope * x / size) - weight).abs().max() < EXPONENTIAL_TO:
        return {"slope": slope}
    powers = (x / (size - 1))[:, None] ** torch.arange(4)
    curve = torch.linalg.lstsq(powers, (1 / weight)[:, None]).solution[:, 0]
    return {"curve": tuple(curve.tolist())}


@each_case("attention_bias", having="param/tag")
def test_fastv_keeps_what_the_patched_code_keeps(case):
    start, length = case["param/sys_len"], case["param/img_len"]
    official = case["out/pad_mask"]
    cells = official.shape[0]
    if (
        case["param/mask_rule"] == "unpad"
    ):  # their baseline's rule, not the method's: taken as it is
        padding = 1 - official.flatten()[None]
    else:
        padding = padding_of(case["param/image_w"], case["param/image_h"], cells)
    method = Debias(
        inner=FastV(layer=case["param/K"], num_tokens=case["param/requested"]),
        shrink=True,
        **trend_of(case["in/weight"]),
    )
    (placement,) = method.placements(32)
    assert placement.layer == case["param/K"]
    seen = case["in/attn_last_row"][:, start : start + length]
    tokens = only(query_attention=seen[None, :, None])
    tokens = tokens.__class__(**(vars(tokens) | {"padding": padding}))
    if padding is not None:
        assert (~method.padded(tokens)).flatten().tolist() == official.flatten().bool().tolist()
    score = (seen[None] * method.weight(tokens)[:, None]).mean(dim=1)[0]
    close(score, case["out/corrected_score"])
    (keep,) = method.plan(tokens, placement.budget.resolve(length)).keep
    assert len(keep) == case["out/effective_count"]
    same_kept(case, keep, case["out/topk_desc_rel"].sort().values, score)


@each_case("attention_bias", having="out/coverage_mask")
def test_patches_are_padding_by_coverage(case):
    cells = case["param/grid"]
    for (width, height), official in zip(
        case["in/sizes_wh"].tolist(), case["out/coverage_mask"], strict=True
    ):
        share = padding_of(width, height, cells)
        for threshold, mask in zip(case["param/thresholds"].tolist(), official, strict=True):
            padded = padding_mask(share, "fastv", threshold).view(cells, cells)
            # where every patch is padding, the picture is scored as if none was
            valid = mask.bool() | ~mask.bool().any()
            assert torch.equal(~padded, valid), (width, height, threshold)


@each_case("attention_bias", having="out/stage0_score")
def test_pyramiddrop_is_corrected_at_its_first_stage(case):
    inner = PyramidDrop(
        layers=tuple(case["param/layer_list"].tolist()), ratios=tuple(case["param/ratios"].tolist())
    )
    method = Debias(inner=inner, **trend_of(case["in/weight"]))
    cells = round(case["param/image_tokens"] ** 0.5)
    padding = padding_of(case["param/image_w"], case["param/image_h"], cells)
    assert method.threshold is None  # the patch's own
    assert THRESHOLDS["pyramiddrop"] == case["param/pad_threshold"]
    alive = torch.arange(sequence_length(case))
    for stage, placement in enumerate(method.placements(case["param/n_layers"])):
        out = outputs(case, stage)
        image = image_part(case, alive)
        assert alive[image].tolist() == out("scored_positions").tolist()
        last = case["in/q_last_instruction"][stage][:, None]
        rows = attention_rows(last, case["in/k"][stage], alive)[..., image]
        index = alive[image][None] - case["param/image_start"]
        tokens = only(query_attention=rows[None])
        tokens = tokens.__class__(
            **vars(tokens)
            | {
                "index": index,
                "num_original": case["param/image_tokens"],
                "padding": padding.gather(1, index),
            }
        )
        num_keep = placement.budget.resolve(case["param/image_tokens"])
        assert num_keep == out("keep_count")
        (keep,) = method.plan(tokens, num_keep).keep
        official = torch.searchsorted(alive[image], out("kept_positions"))
        same_kept(case, keep, official, out("score"))
        alive = drop(alive, image, official)
    assert alive.tolist() == case["out/final_positions"].tolist()
    assert method.default_positions == "compact"
    assert case["out/final_position_ids"].tolist() == list(range(len(alive)))


@each_case("attention_bias", having="out/exp_rate_f64")
def test_published_trends(case):
    """Default slopes are means over the benchmarks whose weights were released."""
    close(
        torch.tensor(FASTV_CURVE, dtype=torch.float64),
        case["out/fastv_inverse_weight_cubic_f64"],
        rtol=1e-9,
    )
    slopes = {}
    for name, rate in zip(case["param/names"], case["out/exp_rate_f64"].tolist(), strict=True):
        slopes.setdefault(str(name).split("/")[0].lower(), []).append(576 * rate)
    for folder, method in (("pyramiddrop", "pyramiddrop"), ("sparsevlms", "sparsevlm")):
        found = sum(slopes[folder]) / len(slopes[folder])
        assert round(2 * found) / 2 == SLOPES[method], found
