"""Choosing at scale: what was measured, and that scorers and methods for videos stay linear."""

import json
from pathlib import Path

import pytest
from benchmarks import scale

JUDGED = [name for name in scale.subjects() if scale.judged(name)]
ROWS = {row["name"]: row for row in json.loads(scale.OUT.read_text())["rows"]}
SMALL, LARGE = 2048, 8192


@pytest.mark.parametrize("method", JUDGED)
def test_memory_of_scorers_and_video_methods_grows_with_the_tokens(method: str) -> None:
    row = scale.measure(method, "64", (SMALL, LARGE), limit_s=60.0)
    assert [size["tokens"] for size in row["sizes"]] == [SMALL, LARGE]
    assert row["memory_exponent"] < 1.3


@pytest.mark.parametrize("method", JUDGED)
def test_scorers_and_video_methods_chose_among_131072_tokens_in_a_minute(method: str) -> None:
    last = ROWS[f"{method}/{scale.COUNT}"]["sizes"][-1]
    assert last["tokens"] == 131_072
    assert last["seconds"] < 60
    assert last["peak_bytes"] < 8 * 4 * 131_072 * scale.WIDTH


def test_every_method_that_reads_tokens_alone_was_measured_or_says_why_not() -> None:
    for keep in (str(scale.COUNT), "quarter"):
        for method in scale.subjects():
            row = ROWS[f"{method}/{keep}"]
            assert row["sizes"]
            assert row["stopped"] or row["sizes"][-1]["tokens"] == 131_072


def test_the_table_shows_what_was_measured() -> None:
    assert scale.OUT.with_suffix(".txt").read_text() == scale.table(list(ROWS.values()))


def test_a_dry_run_of_some_methods_keeps_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scale.json"
    for methods in ("fastervlm,divprune", "fastervlm"):
        words = ["--dry-run", "--keep", "32", "--methods", methods, "--out", str(out)]
        assert scale.main(words) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["divprune/32", "fastervlm/32"]
    assert [size["tokens"] for size in rows[0]["sizes"]] == [128, 256]
    assert scale.main(["--show", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("fastervlm")


def test_a_plan_that_takes_too_long_is_stopped_and_larger_sizes_are_left_out() -> None:
    with pytest.raises(scale.TooLongError):
        scale._within(lambda: [None for _ in iter(int, 1)], 0.01)
    found = [{"tokens": 100, "seconds": 1.0}, {"tokens": 200, "seconds": 4.0}]
    assert scale._expected(found, 400) == pytest.approx(16)
    assert scale._expected(found[:1], 400) == pytest.approx(4)
    found[0]["seconds"] = 1e-6  # noise
    assert scale._expected(found, 400) == pytest.approx(32)
