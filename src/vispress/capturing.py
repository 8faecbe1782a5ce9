"""Capture a model: run prefills and decode steps without Python between their operations."""

from typing import Any, Literal

import torch
from torch import nn

from vispress.adapters.base import find_adapter
from vispress.adapters.decoder import linear_layers
from vispress.checks import check_integer
from vispress.errors import CompressionStateError, ConfigError, UnsupportedModelError


def capture(
    model: nn.Module,
    *,
    max_graphs: int = 32,
    bucket: int = 256,
    prompt_bucket: int = 32,
    backend: Literal["cuda", "tape"] | None = None,
) -> Any:
    """Capture a model, compressed or not: calls whose like was seen run as CUDA graphs.

    At batch 1 a GPU waits for Python, which launches some thousand operations a prefill. A graph
    launches them at once. The first call of each layout (places of visual tokens, padding, sizes)
    is recorded, which costs about four calls; later ones copy their pixels and texts into its
    memory, and results, KV cache and what `compression_report` reads out of it. `model(...)` and
    `model.generate(...)` are used as before.

    What no graph has runs as it would have, and `report()` says why: calls with gradients or
    labels, attention maps, embeddings in place of ids, other caches than `DynamicCache` and
    `StaticCache`, methods whose images decide what comes next. Capture behind `compress_model` or
    ahead of it; `update_compression` is followed.

    Args:
        model: A supported model on one device, in eval mode.
        max_graphs: Graphs that are held, at least 1; the one that was used longest ago goes first.
        bucket: Decode steps on growing caches run on buffers whose room is a multiple of so many
            tokens, at least 16: a conversation that outgrows one moves on to the next.
        prompt_bucket: Prompts whose pictures stand in the same places share a graph up to the next
            multiple of so many tokens, at least 1: text stands behind them, which nothing sees, and
            answers are equal but for rounding. 1: a graph is of one length, and exact. So it is
            where methods read the text or act in the LLM; `report().exact` says so.
        backend: `"cuda"`, or `"tape"`, which records operations on any device and is for tests: it
            is no faster. None: CUDA, on a model that is there.

    Returns:
        A handle with `report()`, `fallbacks` and `remove()`; as a context manager it removes
        itself.

    Raises:
        UnsupportedModelError: No adapter knows the model, or it is not on one CUDA device.
        CompressionStateError: The model is captured already.
        ConfigError: A setting is out of range.
    """
    from vispress.runtime.forward.owner import find_owner
    from vispress.runtime.graphs.backends import CudaGraphs, Tapes
    from vispress.runtime.graphs.captured import CAPTURED, Captured

    check_integer("max_graphs", max_graphs, low=1)
    check_integer("bucket", bucket, low=16)
    check_integer("prompt_bucket", prompt_bucket, low=1)
    if backend not in (None, "cuda", "tape"):
        raise ConfigError(f"backend must be 'cuda', 'tape' or None, got {backend!r}")
    adapter = find_adapter(model)
    if linear_layers(adapter.layer_types):
        raise UnsupportedModelError(
            f"{adapter.family} has layers with linear attention, whose states no graph keeps; "
            "leave capture out (static caches work)"
        )
    held = adapter.base.__dict__.get(CAPTURED)
    if held is not None and held.active:
        raise CompressionStateError("the model is captured already; call remove() on its handle")
    owner = find_owner(model, adapter.base) or adapter.base
    device = _device_of(owner)
    if device.type != "cuda" and backend != "tape":
        raise UnsupportedModelError(
            f"the model is on {device.type}, and CUDA graphs need a CUDA device; backend='tape' "
            "records operations anywhere, for tests"
        )
    how = Tapes() if backend == "tape" else CudaGraphs(device)
    captured = Captured(owner, adapter, how, max_graphs, bucket, prompt_bucket)
    captured.attach()
    return captured


def _device_of(owner: nn.Module) -> torch.device:
    """The one device of a model.

    Raises:
        UnsupportedModelError: It is on several, or its weights are not plain ones.
    """
    devices = {weight.device for weight in owner.parameters()}
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices))) or "none"
        raise UnsupportedModelError(f"capture needs a model on one device, and this is on {names}")
    return devices.pop()
