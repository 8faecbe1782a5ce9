"""Grids of visual tokens over whole pictures, for the controls that must know them."""

from collections.abc import Mapping, Sequence
from typing import Any

from vispress.adapters.base import Grid, Modality, ModelAdapter, find_adapter, list_families
from vispress.errors import UnsupportedMethodError


def grid_adapter(control: str, model: Any) -> ModelAdapter:
    """Find the adapter of a model whose tokens lie on one grid over each whole picture.

    Args:
        control: The control that needs it, for the error.
        model: The model.

    Raises:
        UnsupportedMethodError: Pictures are cut into crops or tiles.
        UnsupportedModelError: No adapter knows the model.
    """
    adapter = find_adapter(model)
    # an adapter without such grids says so of every batch, also of this empty one: a model is
    # refused before any question is asked
    find_grids(control, adapter, "image", {})
    return adapter


def find_grids(
    control: str, adapter: ModelAdapter, modality: Modality, inputs: Mapping[str, Any]
) -> Sequence[Grid]:
    """Find the grid of each picture or video of a batch.

    Args:
        control: The control that needs it, for the error.
        adapter: The model's.
        modality: Image or video.
        inputs: The batch, as its processor makes it.

    Raises:
        UnsupportedMethodError: The family has no such grids.
    """
    grids = adapter.picture_grids(modality, inputs)
    if grids is None:
        whole = "picture" if modality == "image" else "video"
        raise UnsupportedMethodError(
            f"{control} needs one grid of visual tokens over the whole {whole}, which "
            f"{adapter.family} does not have; it works on "
            f"{', '.join(list_families(gives='picture_grids'))}"
        )
    return grids
