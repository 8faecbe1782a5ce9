"""Refuse encoder calls that give other features than the model was compressed for."""

from collections.abc import Mapping, Sequence
from typing import Any

from vispress.adapters.base import ModelAdapter
from vispress.errors import UnsupportedModelError


def check_choice_of_features(
    adapter: ModelAdapter,
    expected: Mapping[str, Any],
    call: Mapping[str, Any],
    readers: Sequence[str],
) -> None:
    """Refuse a call whose arguments choose other features, where the choice matters.

    An encoder layer matters to whoever reads or merges there; what of its output becomes visual
    tokens matters to all.

    Args:
        adapter: The family.
        expected: Its `feature_choice` when the model was compressed.
        call: Arguments of `get_<modality>_features` by name.
        readers: Names of methods that read the encoder's attention or keys, or merge in it.

    Raises:
        UnsupportedModelError: Names the argument, what was expected and what works.
    """
    for name, value in adapter.feature_choice(call).items():
        usual = expected.get(name)
        if value == usual or (isinstance(value, int) and not readers):
            continue
        given = getattr(adapter.base.config, name) if call.get(name) is None else call[name]
        wanted = f"encoder layer {usual - 1} of 0, 1, ..." if isinstance(usual, int) else usual
        why = "its visual tokens would be others"
        if isinstance(value, int):
            why = f"{' and '.join(readers)} would score or merge by that layer"
        raise UnsupportedModelError(
            f"{name}={given!r}: the model was compressed for {wanted}, and {why}. Leave it out of "
            f"the call, or set model.config.{name} before compress_model"
        )
