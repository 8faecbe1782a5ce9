"""Names of models: shipped ones, folders and hub ids. Nothing heavy is imported here."""

import re
from pathlib import Path
from typing import Final

from vispress.errors import ConfigError

REFERENCES: Final = ("reference", "reference-qwen", "reference-qwen-clips")
"""Models that are shipped."""
HUB_ID: Final = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def check_model_name(name: str) -> None:
    """Refuse what names no model: no shipped one, no folder that is there, no hub id.

    Raises:
        ConfigError: The message says what would.
    """
    if name not in REFERENCES and not Path(name).is_dir() and not HUB_ID.fullmatch(name):
        raise ConfigError(
            f"model must be one of {', '.join(map(repr, REFERENCES))}, a folder with a checkpoint, "
            f"or a hub id (org/name or org/name@revision), got {name!r}"
        )
