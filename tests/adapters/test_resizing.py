"""Shorter runs of placeholders: the same words, fewer tokens of each picture, left-padded."""

import pytest
import torch

from vispress.adapters.resizing import shorten_runs

PAD, MARK = 0, 9


def test_every_run_is_shortened_and_padding_moves_left():
    ids = torch.tensor([[0, 0, 1, 9, 9, 9, 9, 2], [9, 9, 9, 9, 3, 9, 9, 9]])
    ids = torch.cat([ids, torch.tensor([[3, 4], [9, 5]])], dim=1)
    mask = (torch.arange(10) >= torch.tensor([[2], [0]])).long()
    out = shorten_runs({"input_ids": ids, "attention_mask": mask}, MARK, 4, 1, PAD)
    assert out["input_ids"].tolist() == [[1, 9, 2, 3, 4], [0, 9, 3, 9, 5]]
    assert out["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]


def test_pictures_side_by_side_keep_their_shares():
    ids = torch.tensor([[9, 9, 9, 9, 9, 9, 1]])
    types = torch.tensor([[1, 2, 3, 4, 5, 6, 0]])
    out = shorten_runs({"input_ids": ids, "token_type_ids": types}, MARK, 3, 2, PAD)
    assert out["input_ids"].tolist() == [[9, 9, 9, 9, 1]]
    assert out["token_type_ids"].tolist() == [[1, 2, 4, 5, 0]]
    assert out["attention_mask"].tolist() == [[1] * 5]


@pytest.mark.parametrize("after", [4, 2])
def test_a_placeholder_under_the_mask_is_no_picture(after):
    ids, mask = torch.tensor([[9, 9, 9, 9, 9, 1]]), torch.tensor([[0, 1, 1, 1, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.zeros(1, 3, 2, 2)}
    out = shorten_runs(inputs | {"place": torch.arange(6)[None]}, MARK, 4, after, PAD)
    assert out["input_ids"].tolist() == [[9] * after + [1]]
    assert out["place"].tolist() == [[*range(1, 1 + after), 5]]
    assert set(out) == {"input_ids", "attention_mask", "place"}
