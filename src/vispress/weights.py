"""Folders of saved compressors: what they are, their parameters, and a card that says of what.

compressor.yaml      the method and its fields, or a chain, as `compress_model(config=...)` reads
modules.safetensors  parameters by place in the chain; not there where no method has any
vispress.json        the card: model, versions, hash of the parameters, what they were trained on
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from torch import Tensor, nn

from vispress.adapters.base import find_adapter
from vispress.config import Config, chain_mapping, load_config
from vispress.errors import ConfigError
from vispress.methods.base import Compressor

MODULES: Final = "modules.safetensors"
CARD: Final = "vispress.json"
CONFIG: Final = "compressor.yaml"
FORMAT: Final = 1
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


@dataclass(frozen=True, eq=False)
class SavedCompressor:
    """What a folder holds beside its `compressor.yaml`.

    Args:
        folder: Where it is.
        card: What `vispress.json` says.
        tensors: Parameters by name.
    """

    folder: Path
    card: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def load(self, model: nn.Module) -> None:
        """Write the parameters into those of a compressed model.

        Raises:
            ConfigError: They are of another family, or do not fit; then nothing is written.
        """
        from vispress.runtime.modules import held

        adapter = find_adapter(model)
        self.check_family(adapter.family)
        self.load_into(held(adapter.base))

    def check_family(self, family: str) -> None:
        """Refuse parameters of another family of models.

        Raises:
            ConfigError: Names both.
        """
        if self.card.get("family") != family:
            raise ConfigError(
                f"{self.folder} was saved of a {self.card.get('family')} model, and this one is "
                f"{family}; train the method on this one"
            )

    @torch.no_grad()
    def load_into(self, module: nn.Module | None) -> None:
        """Write the parameters into those of a compressed model.

        Args:
            module: What holds them; None where no method has any.

        Raises:
            ConfigError: Names are missing or unexpected, or a shape is another one; then nothing is
                written.
        """
        own = {} if module is None else module.state_dict()
        for kind, names in (
            ("lacks", own.keys() - self.tensors),
            ("has", self.tensors.keys() - own),
        ):
            if names:
                some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
                raise ConfigError(
                    f"{self.folder / MODULES} {kind} {some}, which does not fit "
                    f"{self.folder / CONFIG} on this model: it is of another method, other fields "
                    "or a model of another depth"
                )
        for name, tensor in self.tensors.items():
            if tensor.shape != own[name].shape:
                raise ConfigError(
                    f"{self.folder / MODULES}: {name} has the shape {tuple(tensor.shape)}, and "
                    f"this model wants {tuple(own[name].shape)}; it is of a model of another width"
                )
        for name, tensor in self.tensors.items():
            own[name].copy_(_as_sharded(tensor, own[name]))


def find_saved(config: Config | None) -> SavedCompressor | None:
    """Read the parameters that lie beside a configuration; None where it is no folder.

    Raises:
        ConfigError: As `read_saved`.
    """
    if not isinstance(config, str | Path) or not Path(config).is_dir():
        return None
    return read_saved(Path(config))


def read_saved(folder: Path) -> SavedCompressor:
    """Read the card and the parameters of a folder.

    Raises:
        ConfigError: Something is missing, damaged, of a newer format, or a pickle.
    """
    _refuse_pickles(folder, "which can run code when it is read; vispress reads safetensors alone")
    card = _read_card(folder / CARD)
    chain = load_config(folder)
    names = [one.name for one in (chain if isinstance(chain, list) else [chain])]
    if names != card.get("methods"):
        raise ConfigError(
            f"{folder / CONFIG} is of {', '.join(names)}, and the parameters beside it are of "
            f"{card.get('methods')}; keep the files of a folder together"
        )
    path, known = folder / MODULES, card.get("sha256")
    if (known is not None) != path.exists():
        state = "there is none" if known is not None else "it names none"
        raise ConfigError(f"{folder / CARD} and {MODULES} do not belong together: {state}")
    return SavedCompressor(folder, card, {} if known is None else _read_tensors(path, known))


def check_writable(folder: Path) -> None:
    """Refuse, ahead of all work, a folder that `write_saved` would refuse behind it.

    Raises:
        ConfigError: It holds pickles, is no folder, or cannot be written.
    """
    _refuse_pickles(folder, "beside which nothing can be loaded; give a folder of its own")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"cannot write {folder}: {there} is no folder that can be written")


def write_saved(
    folder: Path,
    methods: Sequence[Compressor],
    mean: float | None,
    tensors: Mapping[str, Tensor],
    card: Mapping[str, Any],
) -> None:
    """Write a folder, over one that was there, which stays whole until all is on the disk.

    Args:
        folder: Made if need be.
        methods: The chain.
        mean: Its `mean_keep_ratio`, if it has one of its own.
        tensors: Parameters by name.
        card: What else the card says.

    Raises:
        ConfigError: The folder holds pickles, for which it would be refused when it is read, the
            card is no plain data, or the folder cannot be written.
    """
    import yaml

    _refuse_pickles(folder, "beside which nothing can be loaded; give a folder of its own")
    card = {"format": FORMAT, "methods": [method.name for method in methods], **card}
    try:
        json.dumps(card)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"data must be plain values that JSON can hold: {error}") from error
    config = yaml.safe_dump(chain_mapping(methods, mean), sort_keys=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".saving") as made:
            _write(Path(made), config, tensors, card)
            for path in sorted(Path(made).iterdir(), key=lambda path: path.name == CARD):
                path.replace(folder / path.name)  # the card last: it says what belongs to it
        if not tensors:
            (folder / MODULES).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror or error}") from error


def _write(
    folder: Path, config: str, tensors: Mapping[str, Tensor], card: Mapping[str, Any]
) -> None:
    from safetensors.torch import save

    if tensors:
        host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        (folder / MODULES).write_bytes(save(host))  # `save_file` lets its owner alone read it
    (folder / CONFIG).write_text(config, encoding="utf-8")
    digest = _hash(folder / MODULES) if tensors else None
    text = json.dumps({**card, "sha256": digest}, indent=1)
    (folder / CARD).write_text(text + "\n", encoding="utf-8")


def _as_sharded(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor as FSDP has the one that it goes into."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like), like.device_mesh, like.placements)


def _refuse_pickles(folder: Path, why: str) -> None:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in _PICKLES:
            raise ConfigError(f"{path} is a pickle, {why}")


def _read_card(path: Path) -> Mapping[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror or error}; a folder is what save_compression "
            "writes"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        found = card.get("format") if isinstance(card, dict) else type(card).__name__
        raise ConfigError(f"{path}: format must be {FORMAT}, got {found!r}")
    return card


def _read_tensors(path: Path, known: str) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if _hash(path) != known:
        raise ConfigError(f"{path} is not what {CARD} says (sha256): it was changed or damaged")
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ConfigError(f"{path} is not in the safetensors format: {error}") from error


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hash_config(config: Any) -> str:
    """Hash a model's config, without names, versions and dtypes, which change nothing of it."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items() if str(k) not in _VOLATILE}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    text = json.dumps(plain(config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
