"""Cells of captured models, rehearsed on the CPU at tiny sizes."""

import torch
from benchmarks.gpu import captured, shapes

CPU = torch.device("cpu")


def test_a_row_has_every_variant_eager_and_captured() -> None:
    shape = shapes.TINY_SHAPES["llava_1_5_7b"]
    model = shapes.build(shape, CPU, torch.float32)
    options = {"method": "divprune", "num_tokens": 9}
    row = captured.row(model, shape, 1, CPU, torch.float32, options, "tape")
    assert (
        row["just_that_length"] < shapes.prompt(shape, 1, CPU, torch.float32)["input_ids"].shape[1]
    )
    for variant in ("uncompressed", "compressed", "text"):
        cells = row[variant]
        assert not cells["captured"]["fallbacks"]
        assert cells["captured"]["graphs"] == 2
        assert cells["eager"]["step_ms"]["median"] > 0
    assert len(row["ratios"]) == 8
    assert "forward" not in vars(model)
    questions = row["questions"]
    assert questions["bucketed"]["graphs"] <= 2
    assert not questions["bucketed"]["exact"]
    assert questions["exact"]["graphs"] == 1 + captured.QUESTIONS
