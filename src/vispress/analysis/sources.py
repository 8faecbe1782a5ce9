"""What a user names as the picture to draw. Nothing heavy is imported here."""

from pathlib import Path
from typing import Final

from vispress.errors import ConfigError

SCENE: Final = "scene:"


def check_source(source: str, question: str | None) -> None:
    """Refuse what names neither a file with a question nor a drawn scene.

    Args:
        source: An image file, or `scene:SEED`.
        question: As given; a scene brings its own.

    Raises:
        ConfigError: The seed is no number, a file comes without a question, or is not there.
    """
    if source.startswith(SCENE):
        if not source.removeprefix(SCENE).isdecimal():
            raise ConfigError(f"scene:SEED needs a number >= 0, got {source}")
        return
    if question is None or not question.strip():
        raise ConfigError("give --question for a picture of your own")
    if not Path(source).exists():
        raise ConfigError(
            f"cannot read {source}: No such file or directory; name an image file, or scene:3 for "
            "a drawn one"
        )
