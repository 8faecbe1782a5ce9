"""What `make integrations` has (lmms-eval, datasets, torchvision, torchao, TRL), tiny models."""

import json

import pytest
import torch
from tests.tiny_checkpoints import CHECKPOINTS, picture, save_checkpoint

SIZES = ((40, 60), (100, 50))
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _import_torchvision():
    """Import torchvision, beside a torch without CUDA too.

    The registry's torchvision is built for CUDA and cannot load its operators there; importing it
    only wants them declared. Nothing here calls them: they find boxes.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for operator in _OPERATORS:
            library.define(operator)
        import torchvision  # noqa: F401

        return library
    return None


_DECLARED = _import_torchvision()  # kept: a library's operators go with it


@pytest.fixture(scope="session", params=CHECKPOINTS)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Checkpoints by family."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: save_checkpoint(family, root / family) for family in CHECKPOINTS}


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """A folder with pictures and `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for number, (height, width) in enumerate(SIZES):
        picture(height, width, number).save(path := folder / f"{number}.png")
        row = {"question": f"What is in {number}?", "answer": "red", "image": str(path)}
        lines.append(json.dumps(row) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder
