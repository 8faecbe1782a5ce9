"""Packages that only some parts need, looked for before these parts are entered."""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Final

from vispress.errors import ConfigError

_PROJECT: Final = {"PIL": "pillow", "sklearn": "scikit-learn"}
"""Projects by the module they bring, where the names differ."""

PICTURES: Final = ("PIL",)
SCENES: Final = ("PIL", "sklearn")
BENCH: Final = ("jinja2", "matplotlib", "PIL", "sklearn")


def check_packages(modules: Iterable[str], what: str, *, extra: str = "bench") -> None:
    """Refuse what cannot run for want of packages.

    Args:
        modules: Names as they are imported.
        what: What needs them, for the error: `"the reference model"`.
        extra: The extra of vispress that brings them.

    Raises:
        ConfigError: Names the missing packages and how to install them.
    """
    missing = [_PROJECT.get(name, name) for name in modules if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{what} needs {', '.join(missing)}; run: pip install 'vispress[{extra}]'"
        )
