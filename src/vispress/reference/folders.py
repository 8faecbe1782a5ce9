"""Where the shipped checkpoints and compressors lie. Nothing heavy is imported here.

The demo's are in this package; the others in the distribution `vispress-references`, which a
checkout has beside `src/`.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Final

from vispress.errors import CheckpointError

_HOME: Final = Path(__file__).parent


def _second_home() -> Path:
    checkout = _HOME.parents[2] / "references" / "src" / "vispress_references"
    if checkout.is_dir():
        return checkout
    spec = find_spec("vispress_references")
    return _HOME if spec is None or spec.origin is None else Path(spec.origin).parent


_SECOND: Final = _second_home()
SHIPPED: Final = _HOME / "checkpoint"
SHIPPED_QWEN: Final = _SECOND / "checkpoint_qwen2_5_vl"
SHIPPED_CLIPS: Final = _SECOND / "checkpoint_qwen2_5_vl_clips"
SHIPPED_BY_NAME: Final = {"llava": SHIPPED, "qwen2_5_vl": SHIPPED_QWEN}
_BY_PLAN: Final = {
    "reference": SHIPPED,
    "reference-qwen": SHIPPED_QWEN,
    "reference-qwen-clips": SHIPPED_CLIPS,
}
COMPRESSORS: Final = {
    "llava": _HOME / "compressor",
    "qwen2_5_vl": _SECOND / "compressor_qwen2_5_vl",
}
"""What was trained for the shipped models by `vispress train-compressor`."""


def shipped_folder(name: str) -> Path:
    """Find the folder of a shipped model.

    Args:
        name: As plans call it: `"reference"`, `"reference-qwen"` or `"reference-qwen-clips"`.

    Raises:
        CheckpointError: It is in a distribution that is not installed.
    """
    return installed(_BY_PLAN[name])


def installed(folder: Path) -> Path:
    """Pass a folder on that is there.

    Raises:
        CheckpointError: It is in a distribution that is not installed.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder.name} is in a distribution of its own; run: pip install vispress-references"
        )
    return folder


def weights_of(folder: Path) -> list[Path]:
    """Name the files that hold a model's weights, the parent's first where only a change is stored.

    Args:
        folder: Of a reference model.
    """
    delta = folder / "delta.safetensors"
    if delta.is_file():
        return [SHIPPED / "model.safetensors", delta]
    return [folder / "model.safetensors"]
