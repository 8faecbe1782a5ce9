"""HiRED against its official code, which loses what truncation loses."""

import pytest
import torch
from tests.methods.helpers import anyres, only
from tests.parity.vectors import close, each_case, load

from vispress.methods import HiRED
from vispress.methods.hired import crop_budgets, regions


@each_case("hired", having="in/shallow_cls")
def test_crops_have_the_official_budgets_and_keep_the_official_tokens(case):
    near, deep = (case[f"in/{name}_cls"][..., 1:] for name in ("shallow", "deep"))
    P, _, N = deep.shape
    side, rows, cols = (case[f"param/{key}"] for key in ("side", "grid_h", "grid_w"))
    close(deep.sum(dim=1), case["out/deep_score"])
    close(near[0].sum(dim=0), case["out/shallow_score_full"])
    budget = int(P * N * case["param/token_budget_rate"])
    first = min(int(budget * case["param/alpha"]), N)
    rest, marked = min(budget - first, (P - 1) * N), int(N * (1 - case["param/alpha"]))
    assert first == case["out/full_budget"]
    assert rest == case["out/sub_budget_total"]
    assert marked == case["out/distribution_count"]
    region, sizes = regions(side, rows, cols, "bands"), torch.full((P - 1,), N)
    shares = crop_budgets(near[:1].mean(dim=1), region, sizes, rest, marked)
    if not case["flag/ties"]:
        assert shares[0].tolist() == case["out/sub_budgets"].tolist()

    crops = anyres(side, rows, cols, newlines=False)
    # our place -> the official (crop, token)
    official = crops.segment * N + crops.row * side + crops.col
    attention = torch.stack([near, deep]).transpose(1, 2).flatten(2)[..., official]
    tokens = only(cls_attention=attention[None], crops=crops)
    keep = HiRED(alpha=case["param/alpha"]).plan(tokens, budget).keep[0]
    kept = set(official[keep].tolist())
    theirs = set(torch.where(case["out/keep_mask"].flatten())[0].tolist())
    assert case["out/kept_count"] == len(theirs) <= budget == len(kept)
    if not case["flag/ties"]:
        assert theirs <= kept


@pytest.mark.parametrize("name", [name for name in load("hired") if name.startswith("llava15")])
def test_a_picture_that_is_not_cut_keeps_the_official_tokens(name):
    case = load("hired")[name]
    deep = case["in/deep_cls"][..., 1:]
    num_keep = int(deep.shape[-1] * case["param/token_budget_rate"])
    close(deep.sum(dim=1), case["out/deep_score"])
    keep = HiRED().plan(only(cls_attention=deep), num_keep).keep
    assert keep[0].tolist() == torch.where(case["out/keep_mask"][0])[0].tolist()
    assert case["out/kept_count"] == num_keep
