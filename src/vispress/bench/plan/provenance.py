"""Where a number comes from: commit, versions, device."""

import hashlib
import json
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import vispress

_PACKAGES = ("torch", "transformers", "triton", "accelerate", "numpy")


@cache
def commit() -> str | None:
    """Find the commit of the checkout, with `+` if it was changed; None if installed."""
    file = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(file.parent), *arguments],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # an environment inside some other checkout is not that checkout's code
    if git("ls-files", "--error-unmatch", file.name) is None:
        return None
    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", str(file.parents[2]))
    return head and head + ("+" if changed else "")


def now() -> str:
    """Write this moment in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def digest(data: Any) -> str:
    """Hash plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """List the versions of Python, vispress and what it computes with."""
    installed = {"python": platform.python_version(), "vispress": vispress.__version__}
    for name in _PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def device_name(device: torch.device) -> str:
    """Name the GPU, or the processor's architecture and thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def provenance(model: torch.nn.Module) -> dict[str, Any]:
    """Record what decides a result beside the plan."""
    parameter = next(model.parameters())
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return {
        "commit": commit(),
        "versions": versions(),
        "device": device_name(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "attention": attention,
    }
