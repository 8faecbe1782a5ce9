"""Where the shipped checkpoints and compressors lie. Nothing heavy is imported here."""

from pathlib import Path
from typing import Final

_HOME: Final = Path(__file__).parent
SHIPPED: Final = _HOME / "checkpoint"
SHIPPED_QWEN: Final = _HOME / "checkpoint_qwen2_5_vl"
SHIPPED_CLIPS: Final = _HOME / "checkpoint_qwen2_5_vl_clips"
SHIPPED_BY_NAME: Final = {"llava": SHIPPED, "qwen2_5_vl": SHIPPED_QWEN}
_BY_PLAN: Final = {
    "reference": SHIPPED,
    "reference-qwen": SHIPPED_QWEN,
    "reference-qwen-clips": SHIPPED_CLIPS,
}
COMPRESSORS: Final = {"llava": _HOME / "compressor", "qwen2_5_vl": _HOME / "compressor_qwen2_5_vl"}
"""What was trained for the shipped models by `vispress train-compressor`."""


def shipped_folder(name: str) -> Path:
    """Find the folder of a shipped model.

    Args:
        name: As plans call it: `"reference"`, `"reference-qwen"` or `"reference-qwen-clips"`.
    """
    return _BY_PLAN[name]
