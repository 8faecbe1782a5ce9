"""What every op promises at any size: odd and empty ones, strides, dtypes, hypothesis."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.kernels.op_cases import OPS, agree, make

pytest.importorskip("triton")

# the interpreter computes what `tl.where` drops
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ANY = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
CHOOSES = ("assign_nearest", "maxmin_select", "dpp_select")
CHOOSES += ("cover_select", "distinct_select", "kmeans_starts")


# slow by the interpreter's fault
LARGE = [
    pytest.param(321, marks=pytest.mark.slow(cases=len(OPS))),
    pytest.param(1500, marks=pytest.mark.full),
]


@pytest.mark.some(cases=26)
@pytest.mark.parametrize("N", [1, 37, *LARGE])
@pytest.mark.parametrize("op", OPS)
def test_odd_sizes(randn, assert_accurate, op, N):
    # fp16: blocks are larger and so fewer
    agree(make(op, randn, 1, N, min(N, 3), 20, torch.float16), assert_accurate)


# each count and each dtype; each with each by `make full`
ONE_AND_ALL = [
    (1, torch.float32),
    (13, torch.float16),
    (13, torch.bfloat16),
    pytest.param(1, torch.float16, marks=pytest.mark.full),
    pytest.param(1, torch.bfloat16, marks=pytest.mark.full),
    pytest.param(13, torch.float32, marks=pytest.mark.full),
]


@pytest.mark.some(cases=20)
@pytest.mark.parametrize(("K", "dtype"), ONE_AND_ALL, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_one_and_all_are_kept(randn, assert_accurate, op, K, dtype):
    agree(make(op, randn, 2, 13, K, 37, dtype), assert_accurate)


@pytest.mark.parametrize(("B", "N", "K"), [(0, 5, 2), (2, 5, 0), (2, 0, 0)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_nothing_to_do(randn, op, B, N, K):
    if op == "column_attention" and N == 0:
        N = K = 1  # its own tests have the sequence of no tokens
    case = make(op, randn, B, N, K, 8, torch.float32)
    for mine, theirs in zip(case.run("triton"), case.run("torch"), strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.some(cases=14)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_strides_do_not_matter(randn, op, dtype):
    case = make(op, randn, 2, 19, 3, 24, dtype)
    dense, strided = case.run("triton"), case.strided().run("triton")
    for a, b, c in zip(dense, strided, case.strided().run("torch"), strict=True):
        torch.testing.assert_close(a, b)  # torch's norms depend on strides in the last bit
        assert b.is_contiguous()
        assert c.is_contiguous()


@pytest.mark.parametrize("op", OPS)
def test_fp64_runs_the_reference(randn, op):
    case = make(op, randn, 1, 9, 4, 8, torch.float64)
    for a, b in zip(case.run("triton"), case.run("torch"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_left_alone(randn, op):
    for backend in ("torch", "triton"):
        case = make(op, randn, 2, 11, 4, 8, torch.float32)
        before = {name: x.clone() for name, x in case.tensors.items()}
        case.run(backend)
        assert all(torch.equal(x, before[name]) for name, x in case.tensors.items())


@pytest.mark.slow
@ANY
@given(
    st.sampled_from(OPS),
    st.sampled_from(DTYPES),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 70),
)
def test_any_shape(randn, assert_accurate, op, dtype, B, N, K, D):
    case = make(op, randn, B, N, min(K, N), D, dtype)
    if op not in CHOOSES:
        agree(case, assert_accurate)
        return
    for backend in ("torch", "triton"):
        check_choice(op, case.tensors, case.run(backend)[0], min(K, N))


def check_choice(op, tensors, chosen, K):
    """Every choice is the best one there was, to rounding (a row or two of numbers tie often)."""
    unit = torch.nn.functional.normalize(tensors["x"].double(), dim=-1)
    if op == "assign_nearest":
        targets = torch.nn.functional.normalize(tensors["targets"].double(), dim=-1)
        cosine = unit @ targets.mT
        picked = cosine.gather(2, chosen[..., None])[..., 0]
        assert (picked >= cosine.amax(2) - 1e-5).all()
        return
    assert chosen.shape[1] == K
    if op == "kmeans_starts":
        for row, vectors in zip(chosen.tolist(), unit, strict=True):
            check_starts(row, vectors, tensors["drawn"])
        return
    if op == "distinct_select":  # what falls in which round depends on near ties of all before
        assert all(len(set(row)) == K and max(row) < unit.shape[1] for row in chosen.tolist())
        return
    for row, vectors, weight in zip(chosen.tolist(), unit, list(tensors.values())[1], strict=True):
        assert len(set(row)) == K
        GREEDY[op](row, vectors, weight.double())


def check_greedy_maxmin(row, unit, weight):
    assert weight[row[0]] == weight.max()
    for step in range(1, len(row)):
        distance = (1 - unit @ unit[row[:step]].T).amin(1).clamp(min=0) * weight
        distance[row[:step]] = -1
        assert distance[row[step]] >= distance.max() - 1e-5


def check_greedy_dpp(row, unit, relevance):
    kernel = (unit @ unit.T) * relevance[:, None] * relevance
    for step in range(len(row)):
        seen = row[:step]
        gain = kernel.diagonal().clone()
        if seen:
            inner = torch.linalg.pinv(kernel[seen][:, seen], rtol=1e-5, hermitian=True)
            gain -= torch.einsum("ns,st,nt->n", kernel[:, seen], inner, kernel[:, seen])
        gain[seen] = -1
        assert gain[row[step]] >= gain.max() - 1e-4 * kernel.diagonal().max()


def check_greedy_cover(row, unit, fit):
    similar = ((unit @ unit.T + 1) / 2).clamp(min=0)
    best = torch.zeros(len(unit), dtype=unit.dtype, device=unit.device)
    for step, pick in enumerate(row):
        gain = (similar - best).clamp(min=0).sum(1) + fit
        gain[row[:step]] = -1
        assert gain[pick] >= gain.max() - 1e-4
        best = torch.maximum(best, similar[pick])


def check_starts(row, unit, drawn):
    """Each number falls into the token's share of the squared distances, to rounding."""
    N = len(unit)
    assert row[0] == min(N - 1, int(drawn[0] * N))
    distance = torch.full((N,), float("inf"), dtype=unit.dtype, device=unit.device)
    for step in range(1, len(row)):
        distance = torch.minimum(distance, (1 - unit @ unit[row[step - 1]]).clamp(min=0))
        mass = distance.square().cumsum(0)
        reached, slack = mass[-1] * drawn[step], 1e-3 * mass[-1] + 1e-6
        assert mass[row[step]] >= reached - slack
        assert row[step] == 0 or mass[row[step] - 1] <= reached + slack


GREEDY = {
    "maxmin_select": check_greedy_maxmin,
    "dpp_select": check_greedy_dpp,
    "cover_select": check_greedy_cover,
}
