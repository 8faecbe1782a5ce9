"""Pictures from files, bytes and datasets: right, or refused by name before they are decoded."""

import ast
import io
import json
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vispress.bench.tasks.rows import open_pictures
from vispress.bench.tasks.yaml_task import parse_yaml_task, task_from_yaml
from vispress.cli import app
from vispress.errors import ConfigError
from vispress.picture_files import FORMATS, MAX_PIXELS, open_picture

ROOT = Path(__file__).parents[1]
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
WHITE = [255, 255, 255]
Image.init()
# Pillow 10 reads QOI, and cannot write it
WRITTEN = [name for name in FORMATS if name in Image.SAVE]

# what EXIF's orientations mean: how the stored rows and columns are turned for looking at them
TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def read(data, shown="it"):
    """A picture's pixels; `data` as bytes, or as a file."""
    picture = open_picture(data, shown)
    assert picture.mode == "RGB"
    assert picture.info == {}
    return np.asarray(picture)


def saved(picture, format="PNG", **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, bits, colour, row=b"", *extra):
    """A PNG of equal rows, from the format's definition."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra]
    if row:
        parts.append(chunk(b"IDAT", zlib.compress((b"\0" + row) * height)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def tiff(width, bits, photometric, data):
    """A grey TIFF of one row, little-endian, from the format's definition."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1}
    tags[279] = len(data)
    data += b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, tags[tag], 0) for tag in sorted(tags))
    start = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return start + data + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
        ("JPEG", {"quality": 100, "subsampling": 0}),
    ],
)
def test_pictures_are_turned_as_exif_says(format, options, orientation):
    data = saved(Image.fromarray(COLOURS), format, exif=exif(orientation), **options)
    expected = COLOURS
    if format == "JPEG":
        expected = np.asarray(Image.open(io.BytesIO(data)))
    for source in (data, Image.open(io.BytesIO(data))):
        assert np.array_equal(read(source), TURNED[orientation](expected))
    # once is enough
    assert np.array_equal(read(open_picture(data, "it")), TURNED[orientation](expected))


def test_a_picture_in_hand_is_not_changed():
    data = saved(Image.fromarray(COLOURS), exif=exif(6))
    picture = Image.open(io.BytesIO(data))
    read(picture)
    assert picture.size == (30, 20)
    assert picture.getexif()[0x0112] == 6


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_orientations_that_do_not_exist_turn_nothing(orientation):
    data = saved(Image.fromarray(COLOURS), exif=exif(orientation))
    assert np.array_equal(read(data), COLOURS)


def test_an_orientation_in_xmp():
    text = b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta tiff:Orientation="6"/>'
    data = png(2, 1, 8, 2, bytes([1, 2, 3, 4, 5, 6]), chunk(b"iTXt", text))
    assert read(data).tolist() == [[[1, 2, 3]], [[4, 5, 6]]]


GREYS = [0, 128, 257, 32767, 32768, 65407, 65535]
SHOWN = [0, 0, 1, 127, 128, 255, 255]  # round(value / 257); 128 / 257 is below a half


@pytest.mark.parametrize("kind", ["png", "tiff", "tiff, white is zero", "pgm", "in hand"])
def test_16_bit_greys_are_scaled(kind):
    picture = Image.fromarray(np.array([GREYS], np.uint16))
    source = {
        "png": lambda: saved(picture),
        "tiff": lambda: saved(picture, "TIFF"),
        "tiff, white is zero": lambda: tiff(
            7, 16, 0, struct.pack("<7H", *(65535 - value for value in GREYS))
        ),
        "pgm": lambda: b"P5 7 1 65535\n" + struct.pack(">7H", *GREYS),
        "in hand": lambda: picture,
    }[kind]()
    assert read(source)[0].tolist() == [[value] * 3 for value in SHOWN]


def test_12_bit_greys_are_scaled():
    data = tiff(2, 12, 1, bytes([0xFF, 0xF8, 0x00]))  # 4095 and 2048
    assert read(data)[0, :, 0].tolist() == [255, 128]


def test_16_bit_colours_keep_the_high_byte():
    assert read(png(1, 1, 16, 2, bytes([1, 2, 3, 4, 255, 255])))[0, 0].tolist() == [1, 3, 255]


def alpha(mode, values, opacities):
    picture = Image.new(mode, (len(values), 1))
    picture.putdata([(*value, opacity) for value, opacity in zip(values, opacities, strict=True)])
    return picture


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "in hand"])
def test_transparent_places_are_white(format):
    picture = alpha("RGBA", [(10, 20, 30)] * 3, [0, 255, 51])
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    source = picture if format == "in hand" else saved(picture, format, **options)
    clear, solid, fifth = read(source)[0].tolist()
    assert (clear, solid) == (WHITE, [10, 20, 30])
    # a fifth of it on white
    assert fifth == [206, 208, 210]


def test_grey_with_alpha():
    picture = alpha("LA", [(10,)] * 2, [0, 255])
    assert read(saved(picture)).tolist() == [[WHITE, [10] * 3]]
    assert read(png(2, 1, 16, 4, bytes([9, 9, 0, 0, 7, 0, 255, 255]))).tolist() == [
        [WHITE, [7] * 3]
    ]
    assert read(picture.convert("La")).tolist() == [[WHITE, [10] * 3]]


def test_opaque_pictures_stay_as_they_are():
    opaque = Image.fromarray(np.dstack([COLOURS, np.full((20, 30), 255, np.uint8)]))
    assert np.array_equal(read(saved(opaque)), COLOURS)
    assert np.array_equal(read(saved(Image.fromarray(COLOURS))), COLOURS)
    grey = Image.fromarray(COLOURS[..., 0])
    assert np.array_equal(read(saved(grey)), np.repeat(COLOURS[..., :1], 3, 2))


def test_palettes():
    picture = Image.new("P", (3, 1))
    picture.putpalette([1, 2, 3, 4, 5, 6, 7, 8, 9])
    picture.putdata([0, 1, 2])
    for format in ("PNG", "GIF", "BMP", "TIFF"):
        assert read(saved(picture, format)).tolist() == [[[1, 2, 3], [4, 5, 6], [7, 8, 9]]]
    for format in ("PNG", "GIF"):
        data = saved(picture, format, transparency=1)
        assert read(data).tolist() == [[[1, 2, 3], WHITE, [7, 8, 9]]]
    data = saved(picture, transparency=bytes([255, 255, 0]))
    assert read(data).tolist() == [[[1, 2, 3], [4, 5, 6], WHITE]]
    own = Image.new("P", (1, 1))
    own.putpalette([1, 2, 3, 0], "RGBA")
    assert read(own).tolist() == [[WHITE]]


@pytest.mark.parametrize(
    ("bits", "row", "key", "shown"),
    [
        (1, 0b01000000, 0, [255, 255]),
        (1, 0b01000000, 1, [0, 255]),
        (2, 0b01100000, 1, [255, 170]),
        (4, 0x12, 2, [17, 255]),
        (8, 0x0102, 1, [255, 2]),
        (16, 0x01020304, 0x0102, [255, 3]),
    ],
)
def test_greys_of_which_one_is_transparent(bits, row, key, shown):
    data = row.to_bytes(max(1, bits // 4), "big")
    found = read(png(2, 1, bits, 0, data, chunk(b"tRNS", struct.pack(">H", key))))
    assert found[0].tolist() == [[value] * 3 for value in shown]


def test_colours_of_which_one_is_transparent():
    key = chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))
    assert read(png(2, 1, 8, 2, bytes(range(1, 7)), key)).tolist() == [[WHITE, [4, 5, 6]]]
    with pytest.raises(ConfigError, match="16-bit colours of which one is transparent"):
        read(png(1, 1, 16, 2, bytes(6), key))


def test_bilevel_cmyk_and_ycbcr():
    bilevel = Image.new("1", (2, 1))
    bilevel.putpixel((1, 0), 1)
    for format in ("PNG", "TIFF", "BMP", "PPM"):
        assert read(saved(bilevel, format)).tolist() == [[[0] * 3, WHITE]]
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 0, 0))
    for format in ("JPEG", "TIFF"):
        assert np.abs(read(saved(cmyk, format)).astype(int) - [255, 0, 255]).max() <= 3
    ycbcr = Image.new("YCbCr", (8, 8), (255, 128, 128))
    assert read(saved(ycbcr, "JPEG"))[0, 0].tolist() == WHITE


def test_of_a_stereo_pair_the_first_is_read():
    first, second = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8), "black")
    data = saved(first, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert read(data).min() == 255


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_sequences_are_refused(format):
    first, second = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8), "black")
    data = saved(first, format, save_all=True, append_images=[second])
    with pytest.raises(ConfigError, match="cannot open the picture it: it is a sequence"):
        read(data)
    assert read(saved(first, format)).min() == 255


@pytest.mark.parametrize(
    ("picture", "mode"),
    [
        (Image.fromarray(np.ones((2, 2), np.float32)), "'F'"),
        (Image.fromarray(np.ones((2, 2), np.int32)), "'I'"),
        (Image.new("LAB", (2, 2)), "'LAB'"),
    ],
)
def test_pixels_without_a_known_white_are_refused(picture, mode):
    for source in (picture, saved(picture, "TIFF")):
        with pytest.raises(ConfigError, match=f"mode {mode}, whose black and white"):
            read(source)


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (13_000, 13_000, r"pixels are more than 67 million|exceeds limit"),
        (2**13 + 1, 2**13, "8193 x 8192 pixels are more than 67 million"),
        (2**31 - 1, 2**31 - 1, "exceeds limit"),
        (201, 1, "201 x 1 pixels one side is more than 200 times"),
        (1, 20_000_000, "one side is more than 200 times"),
        (0, 5, "not an image|no pixels|damaged|Error"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_sizes_are_refused_before_anything_is_decoded(monkeypatch, width, height, message):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it is decoded"))
    with pytest.raises(ConfigError, match=message):
        read(png(width, height, 8, 2))


def test_the_largest_sizes_are_decoded(monkeypatch):
    monkeypatch.setattr("vispress.picture_files.MAX_PIXELS", 600)
    assert MAX_PIXELS == 2**26
    assert read(saved(Image.fromarray(COLOURS))).shape == (20, 30, 3)
    assert read(saved(Image.new("RGB", (200, 1)))).shape == (1, 200, 3)
    with pytest.raises(ConfigError, match="more than 0 million"):
        read(saved(Image.new("RGB", (30, 21))))
    with pytest.raises(ConfigError, match="it has no pixels"):
        read(Image.new("RGB", (0, 3)))


def test_files_that_are_no_pictures(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "drawn.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name, reason in {
        "text.png": "it is not an image of a format that is read",
        "empty.png": "it is not an image",
        "drawn.eps": "it is not an image",
        "folder.png": "it is a folder",
        "pipe.png": "it is no regular file",
        "missing.png": "No such file or directory",
        "n\0ll.png": "null",
        "x" * 999: "File name too long",
    }.items():
        with pytest.raises(ConfigError, match=f"cannot open the picture it: .*{reason}"):
            read(tmp_path / name)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_truncated_files():
    for format in WRITTEN:
        data = saved(Image.fromarray(COLOURS), format)
        for length in (8, len(data) // 4, len(data) // 2, len(data) * 3 // 4):
            with pytest.raises(ConfigError, match="cannot open the picture it: "):
                read(data[:length])


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_a_picture_or_a_named_error():
    rng = random.Random(0)
    counts = {True: 0, False: 0}
    sources = [
        saved(Image.fromarray(COLOURS), format, exif=exif(6))
        for format in ("PNG", "JPEG", "TIFF", "WEBP")
    ]
    sources += [saved(Image.fromarray(COLOURS), format) for format in WRITTEN]
    for data in sources:
        for _ in range(100):
            damaged = bytearray(data)
            for _ in range(rng.choice((1, 4))):
                damaged[rng.randrange(min(len(data), 400))] = rng.randrange(256)
            try:
                read(bytes(damaged))
            except ConfigError:
                counts[False] += 1
            else:
                counts[True] += 1
    assert min(counts.values()) > 50


TASK = {"name": "mine", "dataset": "rows.jsonl"}
BOMB = png(2**14, 2**14, 8, 2)


def test_show_refuses_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bomb.png").write_bytes(BOMB)
    question = ["--question", "what is it ?", "--method", "fastv", "--keep-ratio", "0.5"]
    result = CliRunner().invoke(app, ["show", "bomb.png", *question])
    assert isinstance(result.exception, ConfigError), result.exception
    assert "cannot open the picture bomb.png: " in str(result.exception)


def test_a_bomb_in_a_dataset_is_refused_by_name(tmp_path):
    (tmp_path / "bomb.png").write_bytes(BOMB)
    row = {"question": "What?", "answer": "this", "image": "bomb.png"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    task = task_from_yaml(
        parse_yaml_task({"name": "bomb", "dataset": "rows.jsonl"}, "test"), tmp_path
    )
    with pytest.raises(ConfigError, match=r"cannot open the picture .*bomb\.png: "):
        task.draw(1, 0)
    with pytest.raises(ConfigError, match=r"cannot open the picture a/b\.png: "):
        open_pictures({"bytes": BOMB, "path": "a/b.png"}, tmp_path)


def test_a_row_nested_too_deeply_is_refused_by_name(tmp_path):
    (tmp_path / "rows.jsonl").write_text("[" * 100_000)
    task = task_from_yaml(
        parse_yaml_task({"name": "deep", "dataset": "rows.jsonl"}, "test"), tmp_path
    )
    with pytest.raises(ConfigError, match="line 1: no JSON"):
        task.draw(1, 0)


def loose_openers(source):
    """Lines that decode a picture in another way than `open_picture`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.endswith(
                ("Image.open", ".imread", ".imdecode", "imageio.v3", "ImageFile.Parser")
            ):
                found.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module in ("PIL.Image", "imageio", "cv2"):
            found += [node.lineno for alias in node.names if alias.name in ("open", "imread")]
    return found


@pytest.mark.slow
def test_every_picture_goes_through_the_one_loader():
    found = {
        path.relative_to(ROOT).as_posix(): len(loose_openers(path.read_text(encoding="utf-8")))
        for folder in ("src", "examples")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name: n for name, n in found.items() if n} == {"src/vispress/picture_files.py": 1}


@pytest.mark.parametrize(
    "line",
    ["PIL.Image.open(file)", "read = Image.open", "plt.imread(x)", "from PIL.Image import open"],
)
def test_a_loose_opener_is_found(line):
    assert loose_openers(line) == [1]
