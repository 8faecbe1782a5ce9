"""Two checkouts timed in turn: here this one against itself."""

import re
from pathlib import Path

import pytest
from benchmarks.interleaved import ROOT, main


@pytest.mark.full
def test_a_checkout_against_itself(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT), "--rounds", "1", "--methods", "fastv"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["none", "fastv"]
    assert all(re.search(r"\d\.\d{3} of the other's \(\d", line) for line in lines)


def test_what_is_no_checkout_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert f"must be a checkout with a folder src, got {tmp_path}" in capsys.readouterr().err
