"""One loader for every picture that a user or a dataset names: right, or refused by name.

Right means what a viewer shows, in 8-bit RGB: turned as EXIF says, 16-bit greys scaled,
transparent places white. Profiles (ICC) are ignored, as processors of Hugging Face models do.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vispress.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

FORMATS: Final[tuple[str, ...]] = (
    "AVIF",
    "BMP",
    "GIF",
    "JPEG",
    "JPEG2000",
    "PNG",
    "PPM",
    "QOI",
    "TIFF",
    "WEBP",
)
"""Pillow's names. Others have several pictures, no white, or are drawn by a program (EPS)."""
MAX_PIXELS: Final = 2**26
"""Largest picture; it takes up to 0.7 GB while it is loaded."""
MAX_RATIO: Final = 200
"""Largest ratio of sides; processors scale by the short one, so that a line becomes gigabytes."""

_TURNS: Final = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ORIENTATION: Final = 0x0112  # tag of EXIF
_BITS: Final = 258  # tag of TIFF
_PHOTOMETRIC: Final = 262
_GREY: Final = ("1", "L", "I;16", "I;16L", "I;16B", "I;16N")
_COLOUR: Final = ("RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_ALPHA: Final = ("P", "LA", "PA", "RGBA", "La", "RGBa")
_STEPS: Final = {"L;2": 85, "L;4": 17}
"""Greys of few bits are spread over 8, which Pillow forgets of the transparent one."""


class _RefusedError(Exception):
    """What is wrong with a picture, without its name."""


def open_picture(source: "Path | bytes | Picture", shown: str) -> "Picture":
    """Read a picture as a viewer shows it, in 8-bit RGB, with nothing else attached.

    Orientation (EXIF or XMP) is applied. Transparent places are composed on white. 16-bit greys are
    scaled to 8 bits; of 16-bit colours, and of 16-bit greys with alpha, Pillow keeps the high byte.
    CMYK is converted by the plain formula. Of a stereo pair (MPO) the first picture is read.

    Args:
        source: A file, its bytes, or a picture of Pillow.
        shown: Its name in errors.

    Returns:
        A new picture.

    Raises:
        ConfigError: It is missing, damaged, truncated, no picture, of a format not in `FORMATS`, a
            sequence of pictures, larger than `MAX_PIXELS` (told from its header, before it is
            decoded), longer than `MAX_RATIO` times its width, or without a known black and white
            (floats, 32-bit integers, Lab).
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(source, Image.Image):
            return _in_rgb(source)
        if isinstance(source, Path) and source.exists() and not source.is_file():
            raise _RefusedError("it is a folder" if source.is_dir() else "it is no regular file")
        Image.init()
        known = [name for name in FORMATS if name in Image.OPEN]  # AVIF is not built in everywhere
        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(stream, formats=known) as opened:
            return _in_rgb(opened)
    except _RefusedError as error:
        raise ConfigError(f"cannot open the picture {shown}: {error}") from None
    except UnidentifiedImageError as error:
        raise ConfigError(
            f"cannot open the picture {shown}: it is not an image of a format that is read "
            f"({', '.join(FORMATS)})"
        ) from error
    except Exception as error:  # each of Pillow's decoders has errors of its own
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ConfigError(f"cannot open the picture {shown}: {reason}") from error


def _in_rgb(image: "Picture") -> "Picture":
    from PIL import Image

    _check_header(image)
    key, step = image.info.get("transparency"), _STEPS.get(_raw_mode(image), 1)
    image.load()
    # TIFF's loader turns the picture itself, and in old Pillows leaves the tag
    turn = None if image.format == "TIFF" else _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    if image.mode in _GREY or (image.mode == "I" and image.format in ("PNG", "PPM")):
        made = Image.fromarray(_grey(image, key, step)).convert("RGB")
    elif image.mode in _ALPHA or key is not None:
        straight = image.convert("LA") if image.mode == "La" else image
        alpha = straight if straight.mode == "RGBA" else straight.convert("RGBA")
        made = Image.new("RGB", image.size, "white")
        made.paste(alpha, mask=alpha.getchannel("A"))
    else:
        made = image.convert("RGB")
    if turn is not None:
        made = made.transpose(getattr(Image.Transpose, turn))
    made.info = {}  # so that nobody turns it again
    return made


def _check_header(image: "Picture") -> None:
    """Refuse what need not be decoded, or would be decoded wrongly."""
    width, height = image.size
    if 0 in image.size:
        raise _RefusedError(f"it has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise _RefusedError(
            f"its {width} x {height} pixels are more than {MAX_PIXELS / 1e6:.0f} million; make it "
            "smaller"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise _RefusedError(
            f"of its {width} x {height} pixels one side is more than {MAX_RATIO} times the other; "
            "cut it"
        )
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise _RefusedError("it is a sequence of pictures; save the one that is meant by itself")
    wide = image.mode == "I" and image.format in ("PNG", "PPM")
    if image.mode not in (*_GREY, *_COLOUR, *_ALPHA) and not wide:
        raise _RefusedError(
            f"its pixels are of Pillow's mode {image.mode!r}, whose black and white are not known; "
            "save it with 8 bits a channel"
        )
    # Pillow compares the high byte with all 16 bits
    if "transparency" in image.info and _raw_mode(image).startswith("RGB;16"):
        raise _RefusedError("it has 16-bit colours of which one is transparent; save it with alpha")


def _raw_mode(image: "Picture") -> str:
    """How the file holds its pixels; `""` once they are decoded."""
    tiles: list[Any] = getattr(image, "tile", [])
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _grey(image: "Picture", key: Any, step: int) -> Any:
    """A grey picture as uint8 (height, width), its transparent value (a key) made white."""
    if image.mode in ("1", "L"):
        grey = np.array(image.convert("L"))
        return grey if key is None else np.where(grey == key * step, np.uint8(255), grey)
    tags = getattr(image, "tag_v2", {})
    white = 2 ** min(16, *tags.get(_BITS, (16,))) - 1  # TIFF has 12 bits, too
    steps = np.arange(white + 1)
    # a table, so that no picture of wider numbers is made
    table = ((steps * 255 + white // 2) // white).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow minds for 8 bits only
        table = table[::-1]
    if isinstance(key, int):
        table[key] = 255
    values = np.asarray(image)
    return table[values if values.max(initial=0) <= white else np.minimum(values, white)]
