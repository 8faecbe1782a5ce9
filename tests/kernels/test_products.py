"""Products held or computed row by row: the same choices, in the memory that is allowed."""

import pytest
import torch

from vispress.bench.timing.memory import peak_bytes
from vispress_kernels import products as held_products
from vispress_kernels.dpp_select import dpp_select
from vispress_kernels.maxmin_select import maxmin_select
from vispress_kernels.products import Products, gram, samples_together

OPS = {
    "isolated": lambda x, weight: maxmin_select(x, 40, backend="torch"),
    "weighted": lambda x, weight: maxmin_select(x, 40, weight=weight, backend="torch"),
    "dpp": lambda x, weight: dpp_select(x, weight, 40, backend="torch"),
}


@pytest.mark.parametrize("N", [1, 144, 145, 300])
def test_blocks_make_the_whole_product(randn, N):
    rows = randn(2, N, 20)
    torch.testing.assert_close(gram(rows), rows @ rows.mT)


@pytest.mark.parametrize("whole", [True, False])
def test_a_row_is_one_tokens_products_and_equal_tokens_have_equal_ones(randn, whole):
    # a product of so many rounds the last copies otherwise
    tokens = randn(2, 37, 130).repeat(1, 4, 1)
    products = Products(tokens, 1, whole=whole)
    assert (products.held is not None) == whole
    for i in range(148):
        row = products.row(torch.tensor([i, 3], device=tokens.device))
        expected = torch.stack([tokens[0] @ tokens[0, i], tokens[1] @ tokens[1, 3]])
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(row[:, 37:], row[:, :-37])


def test_the_nearest_is_another_and_no_nan(device):
    tokens = torch.tensor([[[3.0, 0], [1, 0], [0, 2], [float("nan"), 1]]], device=device)
    products = Products(tokens, 1, whole=True)
    assert products.nearest().tolist() == [[3, 3, 0, float("-inf")]]
    assert products.row(torch.tensor([0], device=device))[0, :3].tolist() == [9, 3, 0]


@pytest.mark.parametrize("op", OPS)
def test_without_room_for_all_products_the_same_is_chosen(randn, monkeypatch, op):
    x, weight = randn(3, 60, 8), randn(3, 120).abs()
    x = torch.cat([x, x], dim=1)
    held = OPS[op](x, weight)
    monkeypatch.setattr(held_products, "MOST_HELD", 120**2)  # of one sample
    assert samples_together(x) == 1
    assert torch.equal(OPS[op](x, weight), held)
    monkeypatch.setattr(held_products, "MOST_HELD", 0)
    assert samples_together(x) == 3
    assert torch.equal(OPS[op](x, weight), held)


@pytest.mark.parametrize("op", OPS)
def test_samples_that_are_held_apart_take_the_memory_of_one(randn, monkeypatch, op):
    x, weight = randn(6, 500, 8), randn(6, 500).abs()
    monkeypatch.setattr(held_products, "MOST_HELD", 500**2)
    # a matrix, its twin with equal columns, what is computed of it
    assert peak_bytes(x.device, lambda: OPS[op](x, weight)) < 3 * 4 * 500**2
