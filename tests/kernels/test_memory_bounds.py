"""The memory law: what an op holds beside its inputs is O(N D + K), at N = 8,192.

Every bound is a sum of parts that the op's own file names, in bytes; a matrix of N x N fp32 numbers
alone would be 256 MiB here, thirty times the largest bound. Reference and kernel are held to one
bound; without a GPU the launches are left out, as a kernel allocates nothing.
"""

from importlib import import_module
from unittest.mock import patch

import pytest
import torch
from tests.kernels.op_cases import OPS, make

from vispress.bench.timing.memory import LiveBytes, peak_bytes
from vispress_kernels.maxmin_select import maxmin_select

pytest.importorskip("triton")

N, K, D = 8192, 64, 32
F = 4  # bytes of fp32, in which everything is computed
TOKENS, KEPT, ROW = F * N * D, F * K * D, F * N
SMALL = 2**18  # bests, tables, weights of a tiny projector


def bounds() -> dict[str, int]:
    """Bytes each op may hold at its peak."""
    return {
        # the output, and indices of rows
        "gather_tokens": KEPT + 16 * K,
        # sums of groups and the output; weighted rows; the order of tokens and group weights
        "merge_tokens": 2 * KEPT + 2 * TOKENS + 12 * ROW,
        # logits of a chunk no larger than the keys (three copies in the softmax), the output
        "query_attention": 4 * (2 * TOKENS) + 5 * ROW,
        # blocks of logits no larger than the keys, with their mask; sums; bounds
        "column_attention": 8 * TOKENS + 16 * ROW,
        # fp32 products; norms and dots
        "transition_scores": TOKENS + 10 * ROW,
        # W1 x and two sides of the activation of 20 hidden units; a direction's output of 33
        "perturbation_scores": F * N * (5 * 20 + 2 * 33) + 6 * ROW,
        # half the columns, then half the rows, and the output
        "dct_lowpass": 2 * TOKENS,
        # unit rows; blocks of cosines no larger than the targets; index and cosine
        "assign_nearest": 3 * TOKENS + 6 * ROW,
        # unit rows, their pairs compared in blocks; running distances
        "maxmin_select": 3 * TOKENS + 20 * ROW,
        # scaled rows, the factor's min(K, D) columns; gains
        "dpp_select": 5 * TOKENS + 20 * ROW,
        # unit rows, their pairs compared in blocks; similarities of 64 tokens, twice; gains
        "cover_select": 3 * TOKENS + 150 * ROW,
        # unit rows, both halves of the list, blocks of cosines no larger; the list
        "distinct_select": 4 * TOKENS + 10 * ROW,
        # unit rows, their pairs compared in blocks; distances and their sums
        "kmeans_starts": 3 * TOKENS + 20 * ROW,
    }


def measured(case, backend: str) -> int:
    device = next(iter(case.tensors.values())).device
    return peak_bytes(device, lambda: case.run(backend))


@pytest.mark.parametrize("op", OPS)
def test_the_reference_is_linear(randn, op):
    case = make(op, randn, 1, N, K, D, torch.float32)
    assert measured(case, "torch") <= bounds()[op] + SMALL


@pytest.mark.parametrize("op", OPS)
def test_the_kernel_is_linear(randn, op):
    case = make(op, randn, 1, N, K, D, torch.float32)
    if torch.cuda.is_available():
        assert measured(case, "triton") <= bounds()[op] + SMALL
        return
    module = import_module(f"vispress_kernels.{op}.kernel")
    with patch.object(module, "launch", lambda *args, **options: None):
        assert measured(case, "triton") <= bounds()[op] + SMALL


@pytest.mark.slow
def test_the_isolated_start_is_linear_too(randn):
    x = randn(1, N, D)
    # the search for the most isolated token is assign_nearest's, beside the unit rows
    most = bounds()["maxmin_select"] + bounds()["assign_nearest"] + SMALL
    assert peak_bytes(x.device, lambda: maxmin_select(x, 2)) <= most


def test_a_matrix_of_all_pairs_would_be_seen(randn):
    x = randn(1, N // 8, D)
    assert peak_bytes(x.device, lambda: x @ x.mT) == F * (N // 8) ** 2
    assert 30 * max(bounds().values()) < F * N * N


def test_the_meter_counts_what_is_alive_and_no_views_of_inputs(device):
    x = torch.zeros(1000, device=device)
    with LiveBytes() as memory:
        y = x[::2] + 1
        del y
        z = x.view(10, 100) * 2
    assert memory.peak == 4000
    assert z.shape == (10, 100)
