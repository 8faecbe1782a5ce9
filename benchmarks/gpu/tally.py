"""A pytest plugin that notes every outcome as it comes, so that a stopped run still counts.

Set VISPRESS_TALLY to a file; one JSON object a line is added to it.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest


def _note(**entry: Any) -> None:
    target = os.environ.get("VISPRESS_TALLY")
    if target:
        with Path(target).open("a") as file:
            file.write(json.dumps(entry) + "\n")


@pytest.hookimpl
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test's setup, call or teardown."""
    if report.when == "call" or report.outcome != "passed":
        text = str(report.longrepr)[-300:] if report.outcome == "failed" else ""
        _note(test=report.nodeid, outcome=report.outcome, text=text)


@pytest.hookimpl
def pytest_collection_finish(session: pytest.Session) -> None:
    """How many tests each file has, to tell a run that was cut off from a whole one."""
    for file, number in Counter(item.nodeid.split("::")[0] for item in session.items).items():
        _note(test=file, outcome="collected", number=number)


@pytest.hookimpl
def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that could not be imported."""
    if report.outcome != "passed":
        text = str(report.longrepr)[-600:]
        missing = "ModuleNotFoundError" in text or report.outcome == "skipped"
        _note(test=report.nodeid, outcome="missing" if missing else "failed", text=text)
