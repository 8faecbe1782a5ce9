"""Cases that need two processes: `python -m tests.laws.ranks SUITE FOLDER`, once a rank.

Each rank runs every case of a suite, compares with what one process gives, and writes what differed
into `FOLDER/<rank>.json`. The suites are few, because each process starts torch anew.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.laws.cases import METHODS, VIDEO_ONLY, fits, greedy, inputs_of, logits_of, make
from tests.laws.test_law10_training import labels_of
from tests.tiny import Image, Sample, Text, Video, build, make_inputs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from vispress import (
    compress_model,
    compressed,
    compression_report,
    remove_compression,
    save_compression,
)
from vispress.adapters.base import find_adapter
from vispress.errors import CompressionStateError, UnsupportedModelError
from vispress.methods.base import Compressor
from vispress.training import restore
from vispress.types import Signal

RANKS = 2
Case = tuple[str, Callable[[], None]]
HEADS = frozenset({Signal.QUERY_ATTENTION, Signal.MEAN_ATTENTION, Signal.KEY_NORMS})
"""What is read of all heads of the language model."""
DECODING = ("cmai", "attended_cache", "dycoke", "pyramiddrop")
"""Methods that mask pairs, cut the cache or choose in it, and one whose layers' caches differ."""
CLOSE = 2e-3
"""Of logits with a deviation of 5 to 10, in fp32: products are summed in parts."""


# --- tensor parallelism: half of the heads each


def sharded(family: str, folder: Path) -> Any:
    """The family's model as transformers cuts it for two ranks."""
    plain = build(family, dtype=torch.float32)
    path = folder / family
    if dist.get_rank() == 0:
        plain.save_pretrained(path)
    dist.barrier()
    model = type(plain).from_pretrained(path, tp_plan="auto", dtype=torch.float32).eval()
    model.generation_config = plain.generation_config
    query = model.model.language_model.layers[0].self_attn.q_proj.weight
    assert query.to_local().shape[0] == query.shape[0] // RANKS
    return model


def cut_by_torch(family: str) -> Any:
    """The same by torch's own `parallelize_module`."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = build(family, dtype=torch.float32)
    columns = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.language_model.layers:
        parallelize_module(layer, mesh, {**columns, "self_attn.o_proj": RowwiseParallel()})
    return model


def samples_of(family: str, method: str) -> dict[str, Any]:
    """The common batch, or videos."""
    if method not in VIDEO_ONLY:
        return inputs_of(family, dtype=torch.float32)
    samples = [Sample([Text(3), Video(3, 4, 4), Text(6)])]
    return make_inputs(family, samples, dtype=torch.float32)


def same_as_alone(cut: Any, family: str, method: Compressor, inputs: Mapping[str, Any]) -> None:
    """Kept tokens, logits and (where decoding is another matter) new tokens are one process's."""
    alone, steps = whole(family), 4 if method.name in DECODING else 0
    with compressed(alone, method) as report:
        expected, kept = logits_of(alone, inputs), report.samples
        tokens = greedy(alone, inputs, steps)[0] if steps else None
    with compressed(cut, method) as report:
        found = logits_of(cut, inputs)
        assert report.samples == kept, "another choice"
        again = greedy(cut, inputs, steps)[0] if steps else None
    real = inputs["attention_mask"].bool()
    off = float((found - expected)[real].abs().max())
    assert off < CLOSE, f"logits are off by {off}"
    assert tokens is None or torch.equal(again, tokens), "another answer"


_WHOLE: dict[str, Any] = {}


def whole(family: str) -> Any:
    """One model a family that is not cut."""
    if family not in _WHOLE:
        _WHOLE[family] = build(family, dtype=torch.float32)
    return _WHOLE[family]


def tensor_parallel(folder: Path) -> Iterator[Case]:
    """Every method that reads heads; the ways of generation; sharding by torch; refusals."""
    reads = {m: make("qwen2_5_vl", m).signals() for m in METHODS if fits("qwen2_5_vl", m)}
    of_heads = [m for m, signals in reads.items() if signals & HEADS or m in DECODING]
    images = [m for m in of_heads if fits("llava", m)]
    videos = [m for m in of_heads if m in VIDEO_ONLY]
    cases = {"llava": ["divprune", *images], "qwen2_5_vl": ["fastv", "scm", "dart", *videos]}
    for family, methods in cases.items():
        cut = sharded(family, folder)
        for method in methods:
            inputs = samples_of(family, method)
            yield (
                f"{family} {method}",
                lambda f=family, m=method, i=inputs, c=cut: same_as_alone(c, f, make(f, m), i),
            )
        shared = make(family, "attended_cache", per_head=False)
        yield (
            f"{family} attended_cache, all heads the same",
            lambda f=family, m=shared, c=cut: same_as_alone(
                c, f, m, inputs_of(f, dtype=torch.float32)
            ),
        )
        yield f"{family} static cache", lambda f=family, c=cut: _static(c, f)
        yield f"{family} training", lambda f=family, c=cut: _trained(c, f)
    by_torch = cut_by_torch("llava")
    for method in ("fastv", "dart", "cmai"):
        yield (
            f"cut by torch: {method}",
            lambda m=method: same_as_alone(
                by_torch, "llava", make("llava", m), inputs_of("llava", dtype=torch.float32)
            ),
        )
    yield "cut after compress_model", _cut_too_late
    yield "a cut encoder", _cut_encoder


def _static(cut: Any, family: str) -> None:
    inputs = inputs_of(family, dtype=torch.float32) | {"cache_implementation": "static"}
    alone = whole(family)
    with compressed(alone, make(family, "pyramiddrop")):
        expected = greedy(alone, inputs)[0]
    with compressed(cut, make(family, "pyramiddrop")):
        assert torch.equal(greedy(cut, inputs)[0], expected)


def _trained(cut: Any, family: str) -> None:
    """Losses and a gradient, with the rows read while autograd records."""
    inputs = inputs_of(family, dtype=torch.float32)
    found = []
    for model in (whole(family), cut):
        with compressed(model, make(family, "fastv")):
            loss = model(**inputs, labels=labels_of(inputs)).loss
            norm = model.model.language_model.layers[1].input_layernorm.weight
            (gradient,) = torch.autograd.grad(loss, [norm])
            full = getattr(gradient, "full_tensor", lambda g=gradient: g)()
            found.append((float(loss), full))
    (loss, gradient), (other, again) = found
    assert abs(loss - other) < CLOSE
    assert (gradient - again).norm() < 1e-3 * gradient.norm()


def _cut_too_late() -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model, inputs = build("llava", dtype=torch.float32), inputs_of("llava", dtype=torch.float32)
    compress_model(model, "fastv", keep_ratio=0.5, layer=1)
    attention = model.model.language_model.layers[0].self_attn
    mesh = init_device_mesh("cpu", (RANKS,))
    parallelize_module(attention, mesh, {f"{name}_proj": ColwiseParallel() for name in "qk"})
    with pytest.raises(CompressionStateError, match="behind what deals them out"):
        logits_of(model, inputs)


def _cut_encoder() -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = build("llava", dtype=torch.float32)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.vision_tower.encoder.layers:
        plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        parallelize_module(layer, mesh, plan)
    for method in ("fastervlm", "tome"):
        with pytest.raises(UnsupportedModelError, match=f"{method}: the heads of the vision"):
            compress_model(model, method, keep_ratio=0.5)
    compress_model(model, "fastv", keep_ratio=0.5)
    remove_compression(model)


# --- data parallelism: a sample each

SAMPLES = (
    Sample([Text(5), Image(4, 4), Text(7)]),
    Sample([Text(2), Image(4, 6), Text(3), Image(6, 4), Text(4)]),
)
TRAINED = (
    ("llava", "divprune"),
    ("llava", "fastv"),
    ("llava", "visionzip"),
    ("llava", "cmai"),
    ("llava", "scm"),
    ("llava", "prumerge"),
    ("llava_next", "dart"),
    ("llava_onevision", "fourier"),
    ("qwen2_vl", "lvlm_csp"),
    ("qwen2_5_vl", "transprune"),
    ("qwen2_5_vl", "tome"),
    ("qwen3_vl", "pyramiddrop"),
    ("internvl", "zoo_prune"),
)


def sample_of(family: str, rank: int) -> dict[str, Any]:
    """What a rank trains on: a prompt and an answer of three tokens."""
    inputs = make_inputs(family, SAMPLES, only=rank)
    labels = labels_of(inputs)
    labels[:, :-3] = -100
    return inputs | {"labels": labels}


def draw_parameters(model: nn.Module) -> None:
    """Give parameters of methods random values, in fp64 as the model: FSDP2 wants one dtype."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "vispress_modules" in name:
            nn.init.normal_(parameter, generator=generator)
    model.double()


def gradients_alone(family: str, method: Compressor) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of one process over both samples, and the gradient of their mean."""
    model, losses = build(family).train(), []
    with compressed(model, method):
        draw_parameters(model)
        for rank in range(RANKS):
            loss = model(**sample_of(family, rank)).loss
            (loss / RANKS).backward()
            losses.append(float(loss))
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return losses, found


def check_training(
    family: str, method: Compressor, wrap: Callable[[nn.Module], nn.Module], order: str
) -> None:
    """Wrapped before or behind compression: losses and gradients of one process."""
    losses, expected = gradients_alone(family, method)
    model = build(family).train()
    if order.startswith("compressed first"):
        compress_model(model, method)
        draw_parameters(model)
        wrapped: Any = wrap(model)
    else:
        wrapped = wrap(model)
        compress_model(wrapped, method)
    if order.endswith("checkpointed"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = wrapped(**sample_of(family, dist.get_rank())).loss
    loss.backward()
    assert abs(float(loss) - losses[dist.get_rank()]) < 1e-9
    assert compression_report(wrapped).samples[0].images
    names = {name for name, _ in model.named_parameters()}
    assert expected.keys() <= names
    for name, parameter in model.named_parameters():
        found, wanted = parameter.grad, expected.get(name)
        found = parameter.new_zeros(()) if found is None else found
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        wanted = torch.zeros_like(found) if wanted is None else wanted
        off, scale = (found - wanted).abs().max(), max(1.0, float(wanted.abs().max()))
        assert off < 1e-9 * scale, f"{name} is off by {float(off)}"
    remove_compression(wrapped)


def replicated(model: nn.Module) -> nn.Module:
    """The model under DDP."""
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, find_unused_parameters=True)


def by_layer(model: nn.Module) -> nn.Module:
    """The model under FSDP2, each decoder layer by itself."""
    from torch.distributed.fsdp import fully_shard

    for layer in find_adapter(model).decoder_layers:
        fully_shard(layer)
    return whole_model(model)


def whole_model(model: nn.Module) -> nn.Module:
    """The model under FSDP2 as one."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)
    return model


def parameters(folder: Path) -> Iterator[Case]:
    """Methods that have parameters, which are there before the model is wrapped.

    p-MoD, whose gates lie inside of layers, under every wrap; each other method under one, in turn.
    """
    methods = ["pmod", *(m for m in METHODS if m != "pmod" and make("llava", m).trained)]
    wraps = {"DDP": replicated, "FSDP2": by_layer, "FSDP2 whole": whole_model}
    models = (("llava", ""), ("qwen3_vl", ", checkpointed"))
    for number, method in enumerate(methods):
        for place, (name, wrap) in enumerate(wraps.items()):
            if method != "pmod" and place != number % len(wraps):
                continue
            family, order = models[(number + place) % len(models)]
            yield (
                f"{name}{order}: {family} {method}",
                lambda f=family, m=method, w=wrap, o=order: check_training(
                    f, make(f, m), w, f"compressed first{o}"
                ),
            )
        yield f"saved by all: {method}", lambda m=method: _saved(m, folder)
    yield "too late", lambda: _too_late("pmod")


def _saved(method: str, folder: Path) -> None:
    """Every rank saves what is sharded; what was written is whole."""
    inputs = inputs_of("llava")
    model = compress_model(build("llava"), make("llava", method))
    draw_parameters(model)
    expected = logits_of(model, inputs)
    wrapped = by_layer(model)
    save_compression(wrapped, folder / method)
    dist.barrier()
    mine = find_adapter(model).base.vispress_modules
    before = [p.full_tensor().clone() for p in mine.parameters()]
    with torch.no_grad():
        for p in mine.parameters():
            p.zero_()
    restore(wrapped, folder / method)
    again = [p.full_tensor() for p in mine.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))
    again = compress_model(build("llava"), config=folder / method)
    assert torch.equal(logits_of(again, inputs), expected)


def _too_late(method: str) -> None:
    for wrap, name in ((replicated, "DistributedDataParallel"), (whole_model, "FSDPModule")):
        with pytest.raises(CompressionStateError, match=f"{name} would not share"):
            compress_model(wrap(build("llava")), make("llava", method))


def data_parallel(folder: Path) -> Iterator[Case]:
    """DistributedDataParallel, and FSDP2 by layers and as a whole."""
    wraps = {"DDP": replicated, "FSDP2": by_layer, "FSDP2 whole": whole_model}
    orders = ("compressed first", "wrapped first", "checkpointed")
    for number, (family, method) in enumerate(TRAINED):
        for place, (name, wrap) in enumerate(wraps.items()):
            order = orders[(number // len(wraps) + place) % len(orders)]
            if method != "fastv" and place != number % len(wraps):
                continue
            yield (
                f"{name}, {order}: {family} {method}",
                lambda f=family, m=method, w=wrap, o=order: check_training(f, make(f, m), w, o),
            )
    yield "FSDP2 evaluates", lambda: _evaluates(by_layer)
    yield from parameters(folder)


def _evaluates(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Without gradients. (`generate` runs the encoder outside of FSDP's forward by itself.)"""
    inputs, chain = inputs_of("qwen2_5_vl"), ("divprune", "fastv")
    methods = [make("qwen2_5_vl", name) for name in chain]
    alone, model = build("qwen2_5_vl"), build("qwen2_5_vl")
    with compressed(alone, methods):
        expected = logits_of(alone, inputs)
    with compressed(wrap(model), methods):
        assert (logits_of(model, inputs) - expected).abs().max() < 1e-9


# --- running them


def spread(folder: Path) -> Iterator[Case]:
    """Every seventh case of either suite."""
    for suite in (tensor_parallel, data_parallel):
        yield from islice(suite(folder), 1, None, 7)


SUITES: dict[str, Callable[[Path], Iterator[Case]]] = {
    "tensor_parallel": tensor_parallel,
    "data_parallel": data_parallel,
    "spread": spread,
}


@contextmanager
def process_group() -> Iterator[None]:
    """Meet the other rank by loopback; give up where it does not answer."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        yield
    finally:
        dist.destroy_process_group()


def main(suite: str, folder: Path) -> None:
    """Run a suite on this rank and write down its failures."""
    found: dict[str, str] = {}
    with process_group():
        for name, case in SUITES[suite](folder):
            try:
                case()
                found[name] = ""
            except Exception:  # a failure of one rank alone leaves the other waiting: then both end
                found[name] = traceback.format_exc(limit=-4)
            (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
            dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
