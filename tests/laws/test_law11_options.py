"""Law 11 for budgets, names and hyper-parameters: what is wrong is named, with what would work."""

from pathlib import Path
from typing import Any

import pytest
from tests.laws.cases import METHODS, NO_BUDGET
from tests.laws.test_law11_refusals import home, refused

from vispress.errors import (
    BudgetError,
    ConfigError,
    UnsupportedMethodError,
)
from vispress.methods import FastV
from vispress.registry import get_method


def wants_a_budget(method: str) -> bool:
    """Whether the method has neither a schedule nor counts of its own."""
    try:
        return not get_method(method)().placements(32)
    except BudgetError:
        return True


def test_methods_that_need_no_budget_are_the_ones_meant() -> None:
    assert {m for m in METHODS if not wants_a_budget(m)} == {
        *NO_BUDGET,
        "catp",
        "adsc",
        "covipal",
        "dycoke",
        "fastvid",
        "framefusion",
        "gamma_mod",
        "hicom",
        "holitom",
        "llava_scissor",
        "lvlm_csp",
        "pmod",
        "prumerge",
        "prunevid",
        "pyramiddrop",
        "quadtree_merge",
        "sparsevlm",
        "sparsevlm_plus",
        "transprune",
        "v2drop",
    }


@pytest.mark.parametrize("method", [m for m in METHODS if wants_a_budget(m)])
def test_a_method_without_a_schedule_wants_a_budget(method: str) -> None:
    # a wrapper names what is inside
    refused(BudgetError, rf"{method}(: \w+)? needs a budget", method=method, model=home(method))


@pytest.mark.parametrize("method", [m for m in METHODS if m not in NO_BUDGET])
def test_two_budgets_are_refused(method: str) -> None:
    refused(BudgetError, "keep_ratio and num_tokens", method=method, keep_ratio=0.4, num_tokens=5)


@pytest.mark.parametrize(
    "ratio", [0, 0.0, -0.1, 1.0001, 2, float("nan"), float("inf"), "half", True]
)
def test_a_ratio_outside_its_range_is_refused(ratio: Any) -> None:
    for name in ("keep_ratio", "mean_keep_ratio"):
        refused(
            BudgetError, rf"{name} must be a number in \(0, 1\]", method="fastv", **{name: ratio}
        )


@pytest.mark.parametrize("count", [0, -1, 2.5, True, "5"])
def test_a_number_of_tokens_that_is_none_is_refused(count: Any) -> None:
    refused(BudgetError, "num_tokens must be", method="fastv", num_tokens=count)


def test_a_mean_that_cannot_be_reached_is_refused_with_the_least_possible() -> None:
    options = {"method": "fastv", "mean_keep_ratio": 0.3, "layer": 3}
    refused(BudgetError, r"layers before it alone give 0\.500", **options)
    refused(BudgetError, "cannot be reached", method="pyramiddrop", keep_ratio=0.1)


@pytest.mark.parametrize(
    ("typed", "meant"), [("fastvlm", "fastervlm"), ("FastV", "fastv"), ("divprun", "divprune")]
)
def test_an_unknown_method_suggests_the_one_meant(typed: str, meant: str) -> None:
    refused(
        UnsupportedMethodError, rf"unknown method '{typed}'; did you mean .*'{meant}'", method=typed
    )


def test_an_unknown_method_like_no_other_lists_all() -> None:
    refused(UnsupportedMethodError, ", ".join(METHODS), method="xyzzy", keep_ratio=0.5)


def test_an_unknown_hyper_parameter_suggests_the_one_meant() -> None:
    refused(
        ConfigError,
        r"fastv has no hyper-parameter 'layr' \(did you mean 'layer'\?\); valid: .*num_tokens",
        method="fastv",
        keep_ratio=0.4,
        layr=2,
    )


@pytest.mark.parametrize(
    "text",
    [
        "method: [",
        "- fastv",
        "keep_ratio: 0.5",
        "method: 3",
        "",
        "chain: []",
        "chain: fastv",
        "chain: [fastv]",
        "{chain: [{method: fastv, keep_ratio: 0.5}], method: fastv}",
        "{method: fastv, keep_ratio: 0.5, nonsense: 1}",
    ],
)
def test_a_bad_configuration_names_its_file_or_the_wrong_key(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    refused(ConfigError, "bad.yaml|nonsense", config=path)


def test_a_missing_or_binary_configuration_is_refused_by_name(tmp_path: Path) -> None:
    refused(ConfigError, r"cannot read .*nowhere\.yaml", config=tmp_path / "nowhere.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    refused(ConfigError, r"bytes\.yaml is not valid YAML", config=tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "either method or config"),
        ({"method": "fastv", "config": "x.yaml"}, "either method or config"),
        ({"method": []}, "empty list"),
        ({"method": [FastV(keep_ratio=0.5), 3]}, "got int"),
        ({"method": FastV}, "got its class"),
        ({"method": FastV(keep_ratio=0.5), "keep_ratio": 0.4}, "cannot be given beside"),
        ({"method": ["random"], "num_tokens": 4}, "cannot be given beside"),
        ({"method": "fastv", "keep_ratio": 0.5, "positions": "packed"}, "positions must be"),
        ({"method": "fastv", "keep_ratio": 0.5, "backend": "cuda"}, "backend must be"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(
    options: dict[str, Any], match: str
) -> None:
    refused(ConfigError, match, **options)
