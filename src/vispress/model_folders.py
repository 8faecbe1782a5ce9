"""Reading a model folder: weights from safetensors only, never its code, never a question.

Every `from_pretrained` and `from_config` of the package stands here. transformers asks on standard
input whether to run the code that a folder brings, unless it is told not to; some of its loaders
ask whatever they are told (a tokenizer below a processor that no file names, a decoder inside a
model), so a folder's files are looked through before anything is loaded.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from vispress.adapters.base import list_families
from vispress.errors import CheckpointError, ConfigError

_PROCESSING: Final = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
)
_ELSEWHERE: Final = {
    "adapter_config.json": "merge the adapter (merge_and_unload of peft) and save the whole model",
    "audio_tokenizer_config.json": "take the file out: sound is not supported",
}
_ATTENTION: Final = ("attn_implementation", "_attn_implementation")
_DEEPEST: Final = 32
"""Levels of a settings file; real ones have under ten, and copying one recurses through them."""


def load_part(kind: Any, source: Path | str, what: str, **options: Any) -> Any:
    """Load a configuration, model or processor with transformers' own code.

    Args:
        kind: A class with `from_pretrained`.
        source: A folder; for a configuration also a hub id.
        what: What is loaded, for errors: `"the weights of org/name"`.
        **options: For `from_pretrained`.

    Raises:
        CheckpointError: A file is missing, damaged, or would run code or unpickle.
        ConfigError: A package is missing.
    """
    if Path(source).is_dir():
        check_folder(Path(source), what)
    try:
        return kind.from_pretrained(source, trust_remote_code=False, **options)
    except ImportError as error:
        raise ConfigError(
            f"loading {what} needs a package that is missing ({first_line(error)}); "
            "run: pip install 'vispress[hub]'"
        ) from error
    except Exception as error:  # safetensors' own, RecursionError, and every kind of mismatch
        raise CheckpointError(f"cannot load {what}: {first_line(error)}") from error


def load_model(kind: Any, folder: Path, what: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a model, and which weights were missing or did not fit, as transformers tells it.

    Args:
        kind: A class of models.
        folder: Has its weights as safetensors.
        what: As in `load_part`, which has the errors.
        **options: For `from_pretrained`.
    """
    bins = sorted(file.name for file in folder.glob("*.bin"))
    if bins and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"cannot load {what}: only safetensors are read, and there is only {', '.join(bins)} "
            "(a pickle, which can run code); load it where you trust it and save_pretrained it"
        )
    model, info = load_part(
        kind,
        folder,
        what,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    return model, info


def skeleton(config: Any) -> Any:
    """The model of a configuration without weights (on the meta device).

    Raises:
        CheckpointError: transformers builds no image-text-to-text model from it.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except Exception as error:  # unknown types, sizes that do not fit
        raise CheckpointError(f"cannot build the model: {first_line(error)}") from error


def check_folder(folder: Path, what: str) -> None:
    """Refuse a folder from which transformers would run code, ask, or unpickle.

    Files that are missing are left to whoever needs them.

    Args:
        folder: The folder.
        what: What it is, for errors.

    Raises:
        CheckpointError: A file is damaged, names code, weights that are no safetensors or files
            outside the folder, or there is a PEFT adapter.
    """
    if (folder / "config.json").is_file():
        _check_config(read_settings(folder / "config.json", what), what)
    for name in _PROCESSING:
        if (folder / name).is_file():
            _check_processing(read_settings(folder / name, what), name, what)
    for name, advice in _ELSEWHERE.items():
        if (folder / name).is_file():
            raise CheckpointError(
                f"{what}: {name} names a model that may lie elsewhere, unchecked; {advice}"
            )
    for index in sorted(folder.glob("*.safetensors.index.json")):
        _check_index(read_settings(index, what), index.name, what)


def read_settings(file: Path, what: str) -> dict[str, Any]:
    """Parse a JSON file of a model folder.

    Raises:
        CheckpointError: It is no JSON object, or nested too deeply.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise CheckpointError(f"{what}: {file.name} is damaged: nested too deeply") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{what}: {file.name} is damaged: {error!r}") from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{what}: {file.name} is damaged: it must hold a JSON object, not a "
            f"{type(found).__name__}"
        )
    if max(depth for depth, _, _ in _entries(found)) > _DEEPEST:
        raise CheckpointError(
            f"{what}: {file.name} is damaged: nested too deeply (at most {_DEEPEST} levels)"
        )
    return found


def first_line(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = (line.strip() for line in str(error).splitlines())
    return f"{type(error).__name__}: {next(filter(None, lines), '')}"


def _entries(tree: Any) -> Iterator[tuple[int, str, Any]]:
    """`(depth, key, value)` of everything in a JSON tree, without recursion."""
    waiting: list[tuple[int, str, Any]] = [(0, "", tree)]
    while waiting:
        depth, key, value = waiting.pop()
        yield depth, key, value
        if isinstance(value, dict):
            waiting += [(depth + 1, name, part) for name, part in value.items()]
        elif isinstance(value, list):
            waiting += [(depth + 1, key, part) for part in value]


def _check_config(config: dict[str, Any], what: str) -> None:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(
            f"{what}: config.json is damaged: model_type must be a word, got {kind!r}"
        )
    for depth, key, value in _entries(config):
        if key == "auto_map" and depth == 1 and not _known(kind):
            raise CheckpointError(
                f"{what} is of type {kind!r}, which transformers knows only through code that "
                f"config.json names (auto_map: {value}); no code of a checkpoint is run; supported "
                f"families: {', '.join(list_families())}"
            )
        # transformers has the type itself and leaves a model's own code alone, but not a part's
        if key == "auto_map" and depth > 1:
            raise _code("config.json", value, what)
        if key in _ATTENTION and "/" in str(value):
            raise CheckpointError(
                f"{what}: config.json wants attention code from the hub ({key}: {value!r}), and "
                "no code of a checkpoint is run; take the key out"
            )
    weights = config.get("transformers_weights")
    if weights is not None and not _safe(weights, (".safetensors", ".safetensors.index.json")):
        raise _weights("config.json", weights, what)


def _known(kind: str) -> bool:
    from transformers import CONFIG_MAPPING

    return kind in CONFIG_MAPPING


def _check_processing(settings: dict[str, Any], name: str, what: str) -> None:
    for _, key, value in _entries(settings):
        if key == "auto_map":
            raise _code(name, value, what)
        if key == "audio_tokenizer" and value is not None:
            raise CheckpointError(
                f"{what}: {name} names a model of its own ({key}: {value!r}), which may lie "
                "elsewhere and is not loaded; take the key out"
            )


def _check_index(index: dict[str, Any], name: str, what: str) -> None:
    shards = index.get("weight_map")
    if not isinstance(shards, dict):
        raise CheckpointError(f"{what}: {name} is damaged: it has no weight_map")
    for shard in shards.values():
        if not _safe(shard, (".safetensors",)):
            raise _weights(name, shard, what)


def _safe(file: Any, endings: tuple[str, ...]) -> bool:
    """Whether a name is of a file in the folder itself, so that it is read, and hashed, as ours."""
    return isinstance(file, str) and file.endswith(endings) and not {"/", "\\"} & {*file}


def _code(name: str, value: Any, what: str) -> CheckpointError:
    return CheckpointError(
        f"{what}: {name} names code of its own (auto_map: {value}), and no code of a checkpoint is "
        "run; take auto_map out if transformers' own classes fit"
    )


def _weights(name: str, file: Any, what: str) -> CheckpointError:
    return CheckpointError(
        f"{what}: {name} names {file!r} for weights; only .safetensors files in the folder itself "
        "are read (others are pickles, which can run code)"
    )
