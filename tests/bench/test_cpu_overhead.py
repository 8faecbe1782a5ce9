"""The CPU overhead benchmark: meters, and a dry run."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks import cpu_overhead
from benchmarks.gpu.budgets import compressor_of, published
from benchmarks.gpu.overhead import Meter, metered_hooks, metered_plan

from vispress import list_methods
from vispress.runtime.forward import prefill


def test_nested_calls_count_once() -> None:
    meter = Meter()
    inner = meter.wrap(lambda: sum(range(20_000)))
    outer = meter.wrap(inner)
    outer()
    together = meter.take()
    assert together > 0
    assert meter.take() == 0.0

    def broken() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        meter.wrap(broken)()
    inner()  # an error leaves the meter usable
    assert meter.take() > 0


def test_hooks_are_put_back() -> None:
    before = prefill.begin
    with metered_hooks(Meter()):
        assert prefill.begin is not before
    assert prefill.begin is before


def test_a_metered_method_is_the_same_method() -> None:
    method = compressor_of({"method": "fastv", "keep_ratio": 0.5})
    twin = metered_plan(method, Meter())
    assert twin.hyperparameters() == method.hyperparameters()
    assert twin.placements(32) == method.placements(32)


@pytest.mark.parametrize("method", list_methods())
def test_published_budgets_make_compressors(method: str) -> None:
    for has_cls in (True, False):
        options = published(method, 2928, has_cls=has_cls)
        assert compressor_of(options).placements(32)
    options = published(method, 1152, has_cls=True)
    half = published(method, 576, has_cls=True)
    assert options.get("num_tokens", 2) == 2 * half.get("num_tokens", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "methods"),
    [
        (1, "fastv,divprune"),
        pytest.param(1, "divprune,fastv,pyramiddrop", marks=pytest.mark.full),
        pytest.param(2, "fastv", marks=pytest.mark.full),
    ],
)
def test_a_dry_run_writes_shares_of_every_case(
    tmp_path: Path, processes: int, methods: str
) -> None:
    out = tmp_path / "overhead.json"
    options = {"--out": out, "--threads": torch.get_num_threads(), "--processes": processes}
    options |= {"--methods": methods}
    words = [str(word) for pair in options.items() for word in pair]
    assert cpu_overhead.main(["--dry-run", *words]) == 0
    data = json.loads(out.read_text())
    assert data["complete"]
    assert len(data["rows"]) == 2 * len(methods.split(","))
    assert {row["name"].split("/")[1] for row in data["rows"]} == {"0.25", "0.5"}
    for row in data["rows"]:
        assert "error" not in row, row
        assert row["hooks_ms"]["median"] >= row["plan_ms"]["median"] > 0
        assert row["overhead_share"]["median"] > 0
        in_llm = row["method"] in ("fastv", "pyramiddrop")
        assert ("beyond_random_share" in row) != in_llm
