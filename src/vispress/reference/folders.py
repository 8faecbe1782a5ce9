"""Where the shipped checkpoints and compressors lie. Nothing heavy is imported here."""

from pathlib import Path
from typing import Final

_HOME: Final = Path(__file__).parent
SHIPPED: Final = _HOME / "checkpoint"
SHIPPED_QWEN: Final = _HOME / "checkpoint_qwen2_5_vl"
SHIPPED_CLIPS: Final = _HOME / "checkpoint_qwen2_5_vl_clips"
SHIPPED_BY_NAME: Final = {"llava": SHIPPED, "qwen2_5_vl": SHIPPED_QWEN}
COMPRESSORS: Final = {"llava": _HOME / "compressor", "qwen2_5_vl": _HOME / "compressor_qwen2_5_vl"}
"""What was trained for the shipped models by `vispress train-compressor`."""
