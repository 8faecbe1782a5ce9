"""Laws on families that share a layout with an older one: fewer cases of each by default.

Law 1 meets every way once among them, each further law each family once, by a method that changes
from law to law. `make full` runs the whole product.
"""

from collections.abc import Callable
from typing import Any

import pytest
import transformers
from tests.families import ABSENT, TABLE
from tests.laws import (
    test_law01_prune_equals_mask,
    test_law02_identity,
    test_law03_removal,
    test_law04_batched_equals_alone,
    test_law05_masked_placeholders,
    test_law07_cache,
    test_law08_deterministic,
    test_law09_generation_modes,
    test_law10_training,
    test_law12_documents,
    test_law14_prompt_decides,
)
from tests.laws.cases import BUDGETED, DROPPING, METHODS
from tests.laws.selection import Case, number, way
from tests.laws.table import VIDEO_ONLY, fits, model_of
from tests.laws.test_law09_generation_modes import MODES
from tests.tiny import NEWER

from vispress.adapters.base import find_adapter
from vispress.errors import UnsupportedModelError

PRODUCT = [(f, m) for f in NEWER for m in METHODS if m not in VIDEO_ONLY and fits(f, m)]
DROPS = [case for case in PRODUCT if case[1] in {m for _, m in DROPPING}]
KEEPS_ALL = [case for case in PRODUCT if case[1] in {m for _, m in BUDGETED}]
UNCUT = [case for case in DROPS if not TABLE[case[0]].windowed]
"""`test_sliding_cache.py` has what windows leave in a cache."""
PACKED = [case for case in DROPS if not TABLE[case[0]].hybrid]
"""States go on from one document to the next: `test_linear.py` has the refusal."""
SIDES = ("left", "right")


def chosen(law: int | str, among: list[Case]) -> set[Case]:
    """Every way once for law 1, else every family once."""
    groups: dict[object, list[Case]] = {}
    for family, method in among:
        groups.setdefault(way(method) if law == 1 else family, []).append((family, method))
    turn = number(law)
    return {own[(7 * turn + 3 * place) % len(own)] for place, own in enumerate(groups.values())}


def newer(law: int | str, among: list[Case], turning: tuple[object, ...] = ()) -> list[Any]:
    """Parameters of a law's test; those left out by default are marked `full`."""
    default, found = chosen(law, among), []
    for place, case in enumerate(among):
        for other, value in enumerate(turning or (None,)):
            if TABLE[case[0]].windowed and str(value).startswith("static"):
                continue  # refused by name
            runs = case in default and other == (place + number(law)) % max(len(turning), 1)
            values = (*case, value) if turning else case
            found.append(pytest.param(*values, marks=() if runs else pytest.mark.full))
    return found


LAWS: dict[int | str, tuple[Callable[..., None], list[Case]]] = {
    1: (test_law01_prune_equals_mask.test_prefill_equals_the_masked_model, DROPS),
    "steps": (
        test_law01_prune_equals_mask.test_every_decode_step_equals_the_masked_model,
        DROPS,
    ),
    2: (test_law02_identity.test_a_ratio_of_one_changes_no_bit, KEEPS_ALL),
    3: (test_law03_removal.test_forward_and_generate_leave_nothing_behind, PRODUCT),
    5: (test_law05_masked_placeholders.test_masked_images_are_not_there, PRODUCT),
    7: (test_law07_cache.test_one_sample_stores_its_kept_rows_and_nothing_else, UNCUT),
    8: (test_law08_deterministic.test_twice_is_once_whatever_the_global_seed, PRODUCT),
    9: (
        test_law09_generation_modes.test_a_second_turn_of_text_continues_on_the_short_cache,
        DROPS,
    ),
    "checkpoints": (test_law10_training.test_gradient_checkpointing_changes_no_gradient, PRODUCT),
    12: (test_law12_documents.test_packed_rows_equal_the_masked_model, PACKED),
}
"""Tests of a family and a method, by law."""
OF_THREE: dict[int | str, tuple[Callable[..., None], list[Case], tuple[object, ...]]] = {
    4: (
        test_law04_batched_equals_alone.test_each_sample_of_a_batch_is_what_it_is_alone,
        PRODUCT,
        SIDES,
    ),
    "modes": (
        test_law09_generation_modes.test_mode_equals_the_masked_model,
        DROPS,
        tuple(MODES),
    ),
    10: (
        test_law10_training.test_loss_and_gradients_are_those_of_the_masked_model,
        DROPS,
        SIDES,
    ),
    14: (
        test_law14_prompt_decides.test_answers_change_nothing_of_what_is_kept,
        PRODUCT,
        SIDES,
    ),
}
"""Those of a side of padding or a mode of generation, too."""


def spread(laws: dict[Any, Any]) -> list[Any]:
    """Cases of several laws, each with its name in front."""
    found = []
    for law, (_, *rest) in laws.items():
        for case in newer(law, *rest):
            found.append(pytest.param(law, *case.values, marks=case.marks))
    return found


@pytest.mark.parametrize(("law", "family", "method"), spread(LAWS))
def test_newer_families_keep_the_law(law: int | str, family: str, method: str) -> None:
    LAWS[law][0](family, method)


@pytest.mark.parametrize(("law", "family", "method", "value"), spread(OF_THREE))
def test_newer_families_keep_it_either_way(
    law: int | str, family: str, method: str, value: str
) -> None:
    OF_THREE[law][0](family, method, value)


@pytest.mark.parametrize("family", sorted(ABSENT))
def test_families_for_which_transformers_is_too_old_have_no_tests(family: str) -> None:
    pytest.skip(f"{family} needs transformers {ABSENT[family]}")


def test_families_of_newer_transformers_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = {f: model_of(f) for f in NEWER if TABLE[f].needs != "5.17"}
    monkeypatch.setattr(transformers, "__version__", "5.17.0")
    for family, model in models.items():
        with pytest.raises(UnsupportedModelError, match=rf"{family} needs transformers 5\.2"):
            find_adapter(model)
    assert models or ABSENT


@pytest.mark.parametrize("family", NEWER)
def test_its_adapter_says_the_same(family: str) -> None:
    adapter = find_adapter(model_of(family))
    assert (adapter.family, adapter.transformers) == (family, TABLE[family].needs)
    assert ("video" in adapter.placeholders()) == TABLE[family].videos
