"""YAML and back: `method` plus the fields of that method's dataclass, nothing else."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vispress.chain import Chain
from vispress.checks import suggest
from vispress.errors import ConfigError
from vispress.methods.base import BUDGETS, Compressor
from vispress.registry import get_method
from vispress.yaml_files import read_yaml, shipped_files

Config = str | Path | Mapping[str, Any]
"""A YAML file, a folder with one, the name of a shipped configuration, or a mapping as in YAML."""


def make_compressor(name: str, **hyperparameters: Any) -> Compressor:
    """A compressor from its name and hyper-parameters.

    Raises:
        UnsupportedMethodError: Unknown method.
        ConfigError: Unknown hyper-parameter; the message names the valid ones.
        BudgetError: A budget is doubled or out of range.
    """
    cls = get_method(name)
    return cls(**_checked(cls, name, hyperparameters))


def changed_compressor(method: Compressor, changes: Mapping[str, Any]) -> Compressor:
    """A compressor with other hyper-parameters; a new budget takes the place of the old one.

    Raises:
        ConfigError: Unknown hyper-parameter; the message names the valid ones.
        BudgetError: A budget is doubled or out of range.
    """
    values = _checked(type(method), method.name, changes)
    budget = dict.fromkeys(BUDGETS) if set(BUDGETS) & set(values) else {}
    return replace(method, **(budget | values))


def _checked(
    cls: type[Compressor], name: str, hyperparameters: Mapping[str, Any]
) -> dict[str, Any]:
    """Hyper-parameters of a method's class as it takes them; unknown ones are refused."""
    valid = [field.name for field in fields(cls)]
    for key in hyperparameters:
        if key not in valid:
            close = difflib.get_close_matches(str(key), valid, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(
                f"{name} has no hyper-parameter {key!r}{hint}; valid: {', '.join(valid)}"
            )
    return {key: _from_yaml(value, f"{name}, {key}") for key, value in hyperparameters.items()}


def _from_yaml(value: Any, where: str) -> Any:
    """What a dataclass holds: tuples for lists, compressors for mappings that name a method."""
    if isinstance(value, list | tuple):
        return tuple(_from_yaml(item, f"{where}[{i}]") for i, item in enumerate(value))
    return from_mapping(value, where) if isinstance(value, Mapping) else value


def _to_yaml(value: Any) -> Any:
    """The inverse of `_from_yaml`."""
    if isinstance(value, Compressor):
        return to_mapping(value)
    return [_to_yaml(item) for item in value] if isinstance(value, tuple) else value


def from_mapping(data: Any, where: str = "configuration") -> Compressor | Chain:
    """A compressor, or a chain, from parsed YAML.

    Args:
        data: `{"method": name, field: value, ...}`, or `{"chain": [such mappings]}` with or
            without the `mean_keep_ratio` of all of it.
        where: Named in errors.

    Raises:
        ConfigError: The shape is wrong.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{where} must be a mapping with a key 'method', got {type(data).__name__}"
        )
    if "chain" in data:
        rest = set(data) - {"chain", "mean_keep_ratio"}
        if rest or not isinstance(data["chain"], list) or not data["chain"]:
            raise ConfigError(
                f"{where}: 'chain' must be a non-empty list, with no key beside it but "
                "mean_keep_ratio"
            )
        parts = [from_mapping(item, f"{where}, chain[{i}]") for i, item in enumerate(data["chain"])]
        if (
            inner := next((i for i, p in enumerate(parts) if isinstance(p, list)), None)
        ) is not None:
            raise ConfigError(f"{where}, chain[{inner}] is a chain itself; list its parts instead")
        return Chain([p for p in parts if isinstance(p, Compressor)], data.get("mean_keep_ratio"))
    if not isinstance(data.get("method"), str):
        raise ConfigError(
            f"{where} needs a key 'method' with a method's name, got {sorted(map(str, data))}"
        )
    return make_compressor(data["method"], **{str(k): v for k, v in data.items() if k != "method"})


def load_config(source: Config) -> Compressor | Chain:
    """Make a compressor, or a chain, from a configuration.

    Args:
        source: A YAML file, a folder that holds one, the name of a shipped configuration
            (`"fastervlm"` is `configs/methods/fastervlm.yaml`), or a mapping as YAML gives it.

    Raises:
        ConfigError: There is no such file, it is not YAML, or it has unknown keys.
    """
    if isinstance(source, Mapping):
        return from_mapping(source, "config")
    path = config_path(source)
    return from_mapping(read_yaml(path), str(path))


def config_path(source: str | Path) -> Path:
    """Find the YAML file of a configuration: a file, that of a folder, or a shipped one by name.

    Raises:
        ConfigError: There is neither.
    """
    path = Path(source)
    if path.is_dir():
        return path / "compressor.yaml"
    shipped = shipped_files("methods") | shipped_files("chains")
    if path.exists():
        return path
    if str(source) in shipped:
        return shipped[str(source)]
    if path.stem in shipped:
        raise ConfigError(
            f"cannot read {path}: no such file; the shipped configuration of that name is "
            f"config={path.stem!r}"
        )
    raise ConfigError(
        f"cannot read {path}: no such file, and among shipped configurations: "
        f"{suggest(path.stem, sorted(shipped))}"
    )


def to_mapping(method: Compressor) -> dict[str, Any]:
    """The inverse of `from_mapping` for one compressor; unset (None) fields are left out."""
    values = {k: v for k, v in method.hyperparameters().items() if v is not None}
    return {"method": method.name} | {k: _to_yaml(v) for k, v in values.items()}


def chain_mapping(methods: Sequence[Compressor], mean_keep_ratio: float | None) -> dict[str, Any]:
    """The inverse of `from_mapping` for one compressor or several, with the budget of all."""
    if len(methods) == 1 and mean_keep_ratio is None:
        return to_mapping(methods[0])
    mean = {} if mean_keep_ratio is None else {"mean_keep_ratio": mean_keep_ratio}
    return {"chain": [to_mapping(method) for method in methods], **mean}


def save_config(method: Compressor, path: str | Path, *, origin: str = "") -> None:
    """Write a compressor as YAML.

    Args:
        method: The compressor.
        path: The file.
        origin: Where it comes from, written above it as comments.
    """
    import yaml

    head = "".join(f"# {line}\n" for line in origin.splitlines())
    text = head + yaml.safe_dump(to_mapping(method), sort_keys=False)
    Path(path).write_text(text, encoding="utf-8")
