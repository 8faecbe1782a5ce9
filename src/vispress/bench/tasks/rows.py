"""Rows of a dataset: a local file or folder, or a Hugging Face hub id that the user named.

A `.jsonl` file is read here; everything else needs the package `datasets`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vispress.errors import ConfigError
from vispress.picture_files import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

Row = Mapping[str, Any]
Rows = Sequence[Row]

_BUILDERS: Final = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".arrow": "arrow"}
_WHOLE: Final = 64 * 2**20  # bytes of a file that are hashed; of a longer one the size must do


class Undecoded(Sequence[Row]):
    """Rows of the package `datasets` with pictures as their bytes or paths, for `open_pictures`.

    The package would decode every picture of a row that is looked at, whatever its size.
    """

    def __init__(self, dataset: Any) -> None:
        self._tables = dataset.with_format("arrow")
        self.column_names: list[str] = dataset.column_names

    def __len__(self) -> int:
        return len(self._tables)

    def __getitem__(self, place: Any) -> Any:
        """Read one row."""
        (row,) = self._tables[place].to_pylist()
        return row

    def column(self, name: str) -> list[Any]:
        """Read one column of all rows, without reading others."""
        (values,) = self._tables.select_columns(name)[:].to_pydict().values()
        return list(values)


def load_rows(
    dataset: str, *, base: Path, subset: str | None, split: str, revision: str | None
) -> Rows:
    """Open a dataset; rows are read when they are indexed.

    Args:
        dataset: A path, as it is or from `base`, or a hub id (downloaded unless it is cached or
            `HF_HUB_OFFLINE` is set).
        base: Folder of the file that names the dataset.
        subset: Configuration of a hub dataset.
        split: As the dataset calls it; a single file has none and ignores it.
        revision: Of a hub dataset.

    Raises:
        ConfigError: There is no such dataset, subset or split, or it cannot be reached or read.
    """
    path = local_path(dataset, base)
    if path is not None and path.suffix == ".jsonl":
        return _read_jsonl(path)
    package = _package(dataset)
    try:
        if path is None:
            rows = package.load_dataset(dataset, subset, split=split, revision=revision)
        elif (path / "dataset_dict.json").is_file():
            rows = package.load_from_disk(str(path))[split]
        elif (path / "state.json").is_file():
            rows = package.load_from_disk(str(path))
        elif path.is_dir():
            rows = package.load_dataset(str(path), subset, split=split)
        elif path.suffix in _BUILDERS:
            builder = _BUILDERS[path.suffix]
            rows = package.load_dataset(builder, data_files=str(path), split="train")
        else:
            raise ConfigError(
                f"cannot read {path}: it is no folder, and files must end in .jsonl, "
                f"{', '.join(_BUILDERS)}"
            )
    except ConfigError:
        raise
    except Exception as error:  # each builder has errors of its own, down to pyarrow's
        raise ConfigError(_cannot(dataset, subset, split, path, error)) from error
    return Undecoded(rows)


def local_path(dataset: str, base: Path) -> Path | None:
    """Find where a dataset lies on this disk, or None."""
    for path in (base / dataset, Path(dataset)):
        if path.exists():
            return path
    if dataset.endswith((".jsonl", *_BUILDERS)) or dataset.startswith((".", "/", "~")):
        raise ConfigError(f"no dataset {dataset!r}: there is no such file or folder (from {base})")
    return None


def fingerprint(dataset: str, base: Path) -> str | None:
    """Hash a local dataset's files (names, sizes, content up to 64 MiB each); None elsewhere."""
    path = local_path(dataset, base)
    if path is None:
        return None
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        size = file.stat().st_size
        digest.update(f"{name} {size}\n".encode())
        if size <= _WHOLE:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def open_pictures(value: Any, folder: Path) -> list["Image"]:
    """Open the pictures in one cell of a dataset, as `open_picture` reads them.

    Args:
        value: A picture, its bytes, `{"bytes": ..., "path": ...}`, a path from `folder`, a list of
            such, or None for no picture.
        folder: Where the dataset lies.

    Raises:
        ConfigError: A picture is refused by `open_picture`, or the cell holds something else.
    """
    from PIL import Image

    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [picture for part in value for picture in open_pictures(part, folder)]
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, bytes) and isinstance(path, str):
            return [open_picture(data, path)]
        return open_pictures(path if data is None else data, folder)
    if isinstance(value, Image.Image | bytes):
        return [open_picture(value, "image data")]
    if not isinstance(value, str):
        raise ConfigError(f"a picture must be a path or image data, got {type(value).__name__}")
    return [open_picture(folder / value, str(folder / value))]


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(json.loads(line))
                if not isinstance(rows[-1], dict):
                    raise ConfigError(f"{path}, line {number}: a row must be a JSON object")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}, line {number}: no JSON: {error}") from error
    return rows


def _package(dataset: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"reading {dataset} needs the package datasets; run: pip install 'vispress[hub]' "
            "(a local .jsonl file needs nothing)"
        ) from error
    return datasets


def _cannot(
    dataset: str, subset: str | None, split: str, path: Path | None, error: Exception
) -> str:
    what = f"{dataset}{f', subset {subset}' if subset else ''}, split {split}"
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if path is not None:
        return f"cannot read the dataset {what}: {reason}"
    return (
        f"cannot load the dataset {what} from the hub: {reason}. It must be in the local cache, or "
        "the hub must be reachable (HF_HUB_OFFLINE unset) and the id right; a local copy works too"
    )
