"""HoloV against its official code; its zero rows, where a run overflows, are filled here."""

import torch
from tests.parity.vectors import close, each_case

from vispress.methods import HoloV
from vispress.methods.holov import holistic_score, quotas


@each_case("holov")
def test_keeps_what_the_official_code_keeps(case):
    x, a = case["in/features"][None], case["in/attention"][None]
    runs, num_keep, alpha = (case[f"param/{k}"] for k in ("num_patches", "keep_count", "alpha"))
    method = HoloV(num_crops=runs, alpha=alpha)
    parts = zip(a.tensor_split(runs, 1), x.tensor_split(runs, 1), strict=True)
    score = [holistic_score(*part, "code", alpha).mean(dim=1) for part in parts]
    score = torch.stack(score, dim=1)
    weight = score / (score.sum(dim=1, keepdim=True) + 1e-6)
    close(score[0], case["out/patch_scores"])
    close(weight[0], case["out/weights"])
    assert quotas(weight, num_keep)[0].tolist() == case["out/allocated"].tolist()
    (ours,) = method.select(a, x, num_keep)
    official = case["out/kept_order_neg1_is_zero_row"]
    official = official[official >= 0]
    assert len(ours.unique()) == num_keep
    assert len(official) == num_keep - case["out/n_zero_rows"]
    assert set(ours[: len(official)].tolist()) == set(official.tolist())
    close(x[0, official], case["out/tokens"][case["out/kept_order_neg1_is_zero_row"] >= 0])
    # in place of zero rows: the most attended of the others
    left = [i for i in a[0].argsort(descending=True).tolist() if i not in official.tolist()]
    assert ours[len(official) :].tolist() == left[: case["out/n_zero_rows"]]
