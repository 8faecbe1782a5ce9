"""Saved compressors in a plan: a folder of `save_compression`, or the name of a shipped one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from torch import nn

from vispress.api import ReportView, compressed
from vispress.chain import Chain
from vispress.checks import suggest
from vispress.config import load_config, to_mapping
from vispress.errors import ConfigError
from vispress.methods.base import BUDGETS, Compressor
from vispress.types import Positions
from vispress.weights import SavedCompressor, read_saved

COMPRESSOR: Final = "compressor"
"""Key of an entry of a plan that names a folder in place of a method."""
SHIPPED: Final = {"reference": "llava", "reference-qwen": "qwen2_5_vl"}
"""Architecture of the models that a compressor is shipped for."""


def read_entry(
    data: Mapping[str, Any], where: str, *, budget: bool
) -> tuple[dict[str, Any], SavedCompressor]:
    """Spell out an entry as the method that its folder holds, with its parameters.

    Args:
        data: `{compressor: FOLDER}`, or a name of `SHIPPED` in place of a folder. Fields beside it
            replace those of the folder, a budget that of the folder; a `method` must be its own.
        where: Named in errors.
        budget: Whether the folder's budget is taken where the entry gives none.

    Raises:
        ConfigError: The folder is missing or damaged, or holds a chain, no parameters or another
            method.
    """
    folder = _folder_of(str(data[COMPRESSOR]), where)
    saved, held = read_saved(folder), load_config(folder)
    if isinstance(held, Chain) or not saved.tensors:
        has = "a chain" if isinstance(held, Chain) else "no parameters"
        raise ConfigError(f"{where}: {folder} holds {has}; write its methods in the plan itself")
    if data.get("method", held.name) != held.name:
        raise ConfigError(f"{where}: {folder} holds {held.name}")
    changes = {key: value for key, value in data.items() if key != COMPRESSOR}
    left_out = BUDGETS if set(BUDGETS) & set(changes) or not budget else ()
    fields = {key: value for key, value in to_mapping(held).items() if key not in left_out}
    return fields | changes, saved


@contextmanager
def compressed_by(
    model: nn.Module,
    chain: Sequence[Compressor],
    saved: SavedCompressor | None,
    positions: Positions | None,
) -> Iterator[ReportView]:
    """Compress a model for the length of a `with` block, by saved parameters if there are any.

    Args:
        model: As in `compress_model`.
        chain: The compressors.
        saved: Their parameters; None leaves them as they begin.
        positions: As in `compress_model`; by default those that were saved.

    Raises:
        ConfigError: The parameters do not fit; see also `compress_model`.
    """
    if saved is not None and positions is None:
        positions = saved.card.get("positions")
    with compressed(model, list(chain), positions=positions) as view:
        if saved is not None:
            saved.load(model)
        yield view


def _folder_of(name: str, where: str) -> Path:
    from vispress.reference import compressor

    if name in SHIPPED:
        return compressor(architecture=SHIPPED[name])
    folder = Path(name)
    if not folder.is_dir():
        raise ConfigError(
            f"{where}: no folder {name!r}, as save_compression and `vispress train-compressor` "
            f"write them; {suggest(name, list(SHIPPED))}"
        )
    return folder
