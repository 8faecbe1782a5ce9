"""What works here: versions, device, attention, model families, the reference checkpoint."""

import inspect
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from vispress import versions
from vispress.errors import CheckpointError, ConfigError, UnsupportedVersionError, VispressError
from vispress.extras import PICTURES, check_packages
from vispress.types import Need

OPTIONAL = {
    "triton": "kernels run as plain torch without it",
    "accelerate": "needed for device_map",
    "peft": "needed for LoRA",
    "flash_attn": "needed for flash_attention_2",
    "matplotlib": "needed for plots and `vispress show`",
    "scikit-learn": "needed to draw the reference model's scenes",
}

Status = Literal["ok", "missing", "broken"]


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Args:
        name: What was looked at.
        status: `"missing"` is a choice, `"broken"` is not.
        detail: Version, or what is wrong and what helps.
    """

    name: str
    status: Status
    detail: str


@dataclass(frozen=True, slots=True)
class Family:
    """A model family.

    Args:
        name: As in tables.
        models: Class names of its base models in transformers.
        has_cls: Whether its vision encoder has [CLS]; None where the checkpoint decides.
        kinds: Special kinds of visual input it has.
        attention_every: One decoder layer in so many has attention; others have linear attention.
    """

    name: str
    models: tuple[str, ...]
    has_cls: bool | None
    kinds: frozenset[Need] = frozenset()
    attention_every: int = 1


def families() -> list[Family]:
    """Every model family that has an adapter, sorted by name."""
    import vispress.adapters  # noqa: F401  (registers the built-in ones)
    from vispress.adapters.registry import list_adapters

    found: dict[str, Family] = {}
    for cls in list_adapters():
        has_cls = inspect.getattr_static(cls, "has_cls")
        # a property looks at the checkpoint's encoder
        known = has_cls if isinstance(has_cls, bool) else None
        every = getattr(cls, "attention_every", 1)
        found[cls.family] = Family(cls.family, tuple(cls.base_classes), known, cls.kinds, every)
    return [found[name] for name in sorted(found)]


def diagnose() -> Iterator[Check]:
    """All checks, one after another; none raises."""
    yield Check("python", "ok", platform.python_version())
    for name in versions.SUPPORTED:
        yield _try(name, partial(versions.check_version, name))
    for name, use in OPTIONAL.items():
        try:
            yield Check(name, "ok", version(name))
        except PackageNotFoundError:
            yield Check(name, "missing", use)
    yield _try("device", _device)
    yield _try("attention", _attention)
    yield _try("kernels", _kernels)
    yield _try("methods", _methods)
    for family in families_or_none():
        yield _try(f"model family {family.name}", partial(_family, family))
    yield _reference_check()


def families_or_none() -> list[Family]:
    """`families()`, or none where transformers cannot be imported."""
    try:
        return families()
    except (ImportError, RuntimeError):  # RuntimeError: transformers wraps what its modules raise
        return []


def _try(name: str, probe: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", probe())
    except VispressError as error:
        return Check(name, "broken", str(error))
    except Exception as error:
        return Check(name, "broken", f"{type(error).__name__}: {error}")


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} threads (no CUDA device)"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"CUDA {torch.version.cuda}: {', '.join(names)}"


def _attention() -> str:
    from transformers.utils import is_flash_attn_2_available

    flash = ", flash_attention_2" if is_flash_attn_2_available() else ""
    return f"eager, sdpa{flash}"


def _kernels() -> str:
    import torch

    from vispress_kernels.gather_tokens import gather_tokens

    x, keep = torch.arange(6.0).view(1, 3, 2), torch.tensor([[0, 2]])
    if gather_tokens(x, keep).tolist() != [[[0.0, 1.0], [4.0, 5.0]]]:
        raise RuntimeError("gather_tokens gives wrong values on the CPU")
    if not torch.cuda.is_available():
        return "plain torch"
    gather_tokens(x.cuda(), keep.cuda(), backend="triton")
    return "Triton"


def _methods() -> str:
    from vispress.registry import list_methods

    return f"{len(list_methods())} registered"


@cache
def _names() -> frozenset[str]:
    """What transformers has; to ask for each would import its code: seconds, for all of them."""
    import transformers

    return frozenset(dir(transformers))


def _family(family: Family) -> str:
    missing = [name for name in family.models if name not in _names()]
    if missing:
        raise UnsupportedVersionError(
            f"this transformers has no {', '.join(missing)}; vispress needs "
            f"transformers{versions.SUPPORTED['transformers']}"
        )
    return ", ".join(family.models)


def _reference_check() -> Check:
    name = "reference checkpoint"
    try:
        check_packages(PICTURES, "its processor")
    except ConfigError as error:
        return Check(name, "missing", str(error))
    return _try(name, _reference)


def _reference() -> str:
    """Read the file's header, not the model: that takes seconds."""
    from safetensors import SafetensorError, safe_open

    from vispress.reference.folders import SHIPPED

    path = SHIPPED / "model.safetensors"
    try:
        with safe_open(path, "numpy") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    size = sum(math.prod(shape) for shape in shapes)
    return f"readable, {size / 1e6:.1f} M parameters"
