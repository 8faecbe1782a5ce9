"""Hash what every method gives on every family, to see that a change of the code changes no bit.

    python -m tests.laws.snapshot --out before.json
    python -m tests.laws.snapshot --out after.json --compare before.json

It leans on the public interface and on `tests.tiny` alone, so that one file runs on commits far
apart. `-k TEXT` takes the cases whose name (`images-llava-fastv`) holds the text; names joined by
`|` are alternatives. Where a case gives an error, its kind and its text are what is kept.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tests.tiny import FAMILIES, VIDEO, Image, Sample, Text, Video, build, make_inputs
from torch import Tensor, nn

from vispress import compress_model, compression_report, list_methods, remove_compression
from vispress.adapters.base import find_adapter
from vispress.registry import get_method
from vispress.types import CLS_SIGNALS

PROMPTS = {
    "images": (
        Sample([Text(5), Image(4, 4), Text(7)]),
        Sample([Text(3)]),
        Sample([Text(2), Image(4, 6), Text(3), Image(6, 4), Text(4)]),
    ),
    "videos": (
        Sample([Text(3), Video(3, 4, 4), Text(6)]),
        Sample([Text(2), Video(3, 4, 6), Text(3)]),
    ),
}
SCHEDULED = ("adsc", "pyramiddrop", "sparsevlm", "sparsevlm_plus", "transprune")
"""Methods that run with their defaults; others get a ratio where they take one."""
CHOSEN = ("layers.0.self_attn.q_proj", "layers.3.mlp.up_proj", "layers.5.self_attn.v_proj")
"""Gradients that are hashed beside those of the projector and of the embeddings."""

Inputs = Mapping[str, Any]


def digest(tensors: Iterable[Tensor]) -> str:
    """Hash shapes, dtypes and bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:32]


@cache
def model_of(family: str, dtype: torch.dtype) -> Any:
    """Build one model a family and dtype."""
    return build(family, dtype=dtype)


@contextmanager
def compressed(model: Any, method: str) -> Iterator[None]:
    """Compress inside the block, with a ratio where the method takes one."""
    kind, adapter = get_method(method), find_adapter(model)
    settings: dict[str, Any] = {}
    if kind.takes_budget and method not in SCHEDULED:
        settings["keep_ratio"] = 0.4
    if kind.reads & CLS_SIGNALS and not adapter.has_cls:
        settings["scores"] = "column_mean"
    compress_model(model, method, **settings)
    try:
        yield
    finally:
        remove_compression(model)


def prefill(model: Any, method: str, inputs: Inputs) -> str:
    """Hash the logits of one forward without gradients."""
    with torch.no_grad(), compressed(model, method):
        return digest([model(**inputs).logits])


def kept(model: Any, method: str, inputs: Inputs) -> str:
    """Hash which tokens are alive before each layer: tells a choice from a rounding."""
    with torch.no_grad(), compressed(model, method):
        model(**inputs)
        report = compression_report(model)
        return digest(report.alive(layer) for layer in range(report.num_layers))


def decoding(model: Any, method: str, inputs: Inputs) -> str:
    """Hash the logits of three greedy steps."""
    with compressed(model, method):
        out = model.generate(
            **inputs,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return digest([out.sequences, *out.logits])


def training(model: Any, method: str, inputs: Inputs, *, told: bool) -> str:
    """Hash the loss and some gradients under gradient checkpointing.

    Args:
        model: In eval mode.
        method: Name.
        inputs: With padding.
        told: Whether the labels go into the call; else the loss is taken of the logits.
    """
    labels = inputs["input_ids"]
    new = hasattr(model, "activation_checkpointing_enable")
    prefix = "activation" if new else "gradient"
    model.train()
    getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    try:
        with compressed(model, method):
            if told:
                loss = model(**inputs, labels=labels).loss
            else:
                logits = model(**inputs).logits[:, :-1].flatten(0, 1)
                loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
            model.zero_grad(set_to_none=True)
            loss.backward()
        projector = {id(p) for p in find_adapter(model).projector.parameters()}
        gradients = [
            torch.zeros(()) if p.grad is None else p.grad
            for name, p in model.named_parameters()
            if id(p) in projector or "embed_tokens" in name or any(c in name for c in CHOSEN)
        ]
    finally:
        getattr(model, f"{prefix}_checkpointing_disable")()
        model.zero_grad(set_to_none=True)
        model.eval()
    return digest([loss, *gradients])


def snapshot(prompt: str, family: str, method: str) -> dict[str, str]:
    """Hash all that a case gives."""
    fine, coarse = model_of(family, torch.float64), model_of(family, torch.float32)
    samples = PROMPTS[prompt]
    left = make_inputs(family, samples, padding="left")
    right = make_inputs(family, samples, padding="right", dtype=torch.float32)
    runs: dict[str, Callable[[], str]] = {
        "kept": lambda: kept(fine, method, left),
        "prefill": lambda: prefill(fine, method, left),
        "decoding": lambda: decoding(fine, method, left),
        "training": lambda: training(fine, method, left, told=False),
        "training, labels told": lambda: training(fine, method, left, told=True),
        "prefill, fp32": lambda: prefill(coarse, method, right),
    }
    found = {}
    for name, run in runs.items():
        try:
            found[name] = run()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def cases() -> list[tuple[str, str, str]]:
    """Every method on every family and prompt that has its kind of input."""
    found = []
    for family in FAMILIES:
        kinds = find_adapter(model_of(family, torch.float64)).kinds
        for method in list_methods():
            needs = get_method(method).needs
            if needs is None or needs in kinds:
                found += [("images", family, method)] if needs != "video" else []
                found += [("videos", family, method)] if family in VIDEO else []
    return found


def compare(before: Mapping[str, Inputs], after: Mapping[str, Inputs]) -> list[str]:
    """List cases and kinds of run that differ, and those that one side lacks."""
    found = [f"{name}: only before" for name in before if name not in after]
    for name, hashes in after.items():
        if name not in before:
            found.append(f"{name}: only after")
            continue
        kinds = [k for k in hashes if hashes[k] != before[name].get(k)]
        if kinds:
            found.append(f"{name}: {', '.join(kinds)}")
    return found


def main() -> None:
    """Hash, write, and compare."""
    parser = argparse.ArgumentParser(prog="python -m tests.laws.snapshot")
    parser.add_argument("--out", type=Path, help="JSON that is written")
    parser.add_argument("--compare", type=Path, help="JSON of another commit")
    parser.add_argument("-k", default="", help="cases whose name holds this, '|' for alternatives")
    args = parser.parse_args()
    started, found = time.process_time(), {}
    for case in cases():
        name = "-".join(case)
        if any(part in name for part in args.k.split("|")):
            found[name] = snapshot(*case)
            if args.out:
                args.out.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(f"{len(found)} cases, {time.process_time() - started:.0f} s of CPU\n")
    if args.compare:
        before = json.loads(args.compare.read_text())
        before = {k: v for k, v in before.items() if any(p in k for p in args.k.split("|"))}
        different = compare(before, found)
        sys.stdout.write(("\n".join(different) or "the same") + "\n")
        sys.exit(bool(different))


if __name__ == "__main__":
    main()
