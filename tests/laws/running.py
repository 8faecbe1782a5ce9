"""Compressed forwards as laws look at them: what was planned, kept, merged, and what came out."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from tests.laws.oracle import Sliced
from torch import Tensor

from vispress import compress_model, compression_report, remove_compression
from vispress.adapters.base import find_adapter
from vispress.methods.base import Compressor
from vispress.methods.compute_pruner import ComputePruner
from vispress.report import CompressionReport
from vispress.types import Placement, Signal, TokenPlan, VisualTokens


class Spy:
    """Notes every plan of a compressor (installed on a copy of its class, never on the
    original).
    """

    def __init__(self) -> None:
        self.seen: list[tuple[VisualTokens, TokenPlan]] = []
        self.layers: list[int] = []
        self.softens: str | None = None
        self.computes: ComputePruner | None = None

    def watch(self, method: Compressor) -> Compressor:
        """A compressor that behaves the same and tells."""
        seen, layers, self.softens = self.seen, self.layers, method.softens
        self.computes = method.compute_pruner()
        places: list[int] = []

        class Watched(type(method)):  # type: ignore[misc]
            def placements(self, num_layers: int) -> tuple[Placement, ...]:
                found: tuple[Placement, ...] = super().placements(num_layers)
                places[:] = [placement.layer for placement in found]
                return found

            def signals(self) -> frozenset[Signal]:
                return super().signals() | {Signal.DEPTH}  # type: ignore[no-any-return]

            def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
                plan = super().plan(tokens, num_keep)
                seen.append((tokens, plan))
                # one that shows views alone has a single placement
                layers.append(places[0] if tokens.depth is None else tokens.depth[0])
                return plan

        Watched.__name__ = type(method).__name__
        twin = object.__new__(Watched)
        twin.__dict__.update(method.__dict__)
        return twin  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Run:
    """What a compressed forward gave."""

    logits: Tensor
    report: CompressionReport
    positions: str
    values: Mapping[int, tuple[Tensor, Tensor]]
    encoded: Mapping[str, Any] = field(default_factory=dict)
    """What the vision encoder gave, by method of the model, if something merged in it."""
    real: Tensor | None = None
    """`[B, L]` bool: tokens that are no padding."""

    @property
    def alive(self) -> list[Tensor]:
        """Alive positions of each decoder layer (see `alive_of`)."""
        return alive_of(self.report, self.real)


def alive_of(report: CompressionReport, real: Tensor | None = None) -> list[Tensor]:
    """Alive positions of each decoder layer; where tokens bypass the last one, behind it, too.

    Args:
        report: What was kept.
        real: `[B, L]` bool, tokens that are no padding; None for all.
    """
    alive = [report.alive(layer) for layer in range(report.num_layers)]
    behind, returns = alive[-1].clone(), False
    for b, sample in enumerate(report.samples):
        for image in sample.images:
            if not image.placements or image.placements[-1].until != report.num_layers:
                continue
            gone = [p.kept for p in image.placements if p.until is None]
            stays = gone[-1] if gone else range(image.num_visual)
            places = [image.positions[place] for place in stays]
            behind[b, places] = True if real is None else real[b, places]
            returns = True
    return [*alive, behind] if returns else alive


def run(
    model: Any,
    inputs: Mapping[str, Any],
    method: Compressor | Sequence[Compressor],
    documents: Tensor | None = None,
    **options: Any,
) -> Run:
    """Compress, run a forward, read the report, take it off again.

    Args:
        model: What runs.
        inputs: Its arguments.
        method: A compressor or a chain.
        documents: `[B, L]`, number of the document at each position of packed rows.
        options: Of `compress_model`.
    """
    chain = list(method) if isinstance(method, list | tuple) else [method]
    spies = [Spy() for _ in chain]
    watched = [spy.watch(one) for spy, one in zip(spies, chain, strict=True)]
    compress_model(model, watched, **options)
    try:
        with torch.no_grad(), noting(model, chain) as encoded:
            logits = model(**inputs).logits
        report = compression_report(model)
    finally:
        remove_compression(model)
    default = chain[0].default_positions
    if find_adapter(model).mrope:
        default = "original"
    values = Values({}, {})
    for spy in spies:
        own = changed_rows(report, spy, logits.shape[:2], documents)
        values.update(own)
        values.gates |= own.gates
    mask = inputs.get("attention_mask")
    real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    return Run(logits, report, options.get("positions") or default, values, encoded, real)


_ENCODES = ("get_image_features", "get_video_features")


def _outermost() -> Callable[[Any, Callable[[Any], Any]], Any]:
    """Wraps methods so that what leaves the outermost call passes a function first."""
    depth = 0

    def wrap(method: Any, then: Callable[[Any], Any]) -> Any:
        @wraps(method, assigned=(), updated=())  # generate looks at the signature
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                output = method(*args, **kwargs)
            finally:
                depth -= 1
            return output if depth else then(output)  # Qwen's video method calls the image method

        return wrapped

    return wrap


@contextmanager
def noting(model: Any, chain: Sequence[Compressor]) -> Iterator[dict[str, Any]]:
    """Notes what the encoder of a compressed model gives, if a method of the chain merges in it."""
    found: dict[str, Any] = {}
    base = find_adapter(model).base
    before = {name: base.__dict__[name] for name in _ENCODES if name in base.__dict__}

    def note(name: str) -> Callable[[Any], Any]:
        def noted(output: Any) -> Any:
            found[name] = output
            return output

        return noted

    outermost = _outermost()
    if any(method.changes_encoder() for method in chain):
        base.__dict__.update({name: outermost(each, note(name)) for name, each in before.items()})
    try:
        yield found
    finally:
        base.__dict__.update(before)


@contextmanager
def encoding_as(model: Any, encoded: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the untouched model's encoder gives what was noted (DeepStack features included)."""
    base, outermost = find_adapter(model).base, _outermost()

    def give(output: Any) -> Callable[[Any], Any]:
        return lambda plain: _repeated(
            output, len(plain.pooler_output) // len(output.pooler_output)
        )

    base.__dict__.update(
        {name: outermost(getattr(base, name), give(output)) for name, output in encoded.items()}
    )
    try:
        yield
    finally:
        for name in encoded:
            del base.__dict__[name]


def _repeated(output: Any, times: int) -> Any:
    """The encoder's output when each image comes several times (transformers 5.17, beams)."""
    if times == 1:
        return output
    again, features = copy(output), output.pooler_output
    counts = [len(one) for one in features]

    def each(parts: Any) -> Any:
        if isinstance(parts, Tensor):
            return parts.repeat_interleave(times, dim=0)
        return tuple(part for part in parts for _ in range(times))

    again.pooler_output = each(features)
    if (deep := getattr(output, "deepstack_features", None)) is not None:
        again.deepstack_features = [
            torch.cat(each(x.split(counts))) if isinstance(x, Tensor) else each(x) for x in deep
        ]
    return again


class Values(dict[int, tuple[Tensor, Tensor]]):
    """New values by layer, and `[B, L]`: gates of layers that have one (or what their MLPs leave
    out), and what is added to the logits of keys from a layer on.
    """

    def __init__(
        self,
        values: Mapping[int, Any],
        gates: Mapping[int, Tensor | Sliced],
        soft: Mapping[int, Tensor] | None = None,
    ) -> None:
        super().__init__(values)
        self.gates, self.soft = dict(gates), dict(soft or {})


def changed_rows(
    report: CompressionReport,
    spy: Spy,
    shape: tuple[int, int],
    documents: Tensor | None = None,
) -> Values:
    """New values of merged or replaced tokens by layer, worked out from the plans, row by row."""
    documents = torch.zeros(shape, dtype=torch.long) if documents is None else documents
    found: dict[int, dict[tuple[int, int], Tensor]] = {}
    seen: dict[int, set[tuple[int, int]]] = {}
    gates: dict[int, Any] = {}
    soft: dict[int, Tensor] = {}
    for (tokens, plan), layer in zip(spy.seen, spy.layers, strict=True):
        softens = spy.softens if tokens.training and plan.soft is not None else None
        same = plan.features is None and plan.assign is None and plan.gate is None
        if same and softens is None:
            continue
        bucket = [
            (b, image)
            for b, image in _bucket_images(report, tokens, documents)
            if (b, image.positions[0]) not in seen.setdefault(layer, set())
        ]
        if (
            tokens.memory and softens is None
        ):  # rows part at earlier placements, and some ask for no plan any more
            bucket = [one for one in bucket if _left(one[1], layer) == _rasters(tokens, plan)[0]]
        if len(bucket) > tokens.batch:  # texts are read: equally long ones are a bucket
            length = _texts(report, documents, *bucket[0])
            bucket = [one for one in bucket if _texts(report, documents, *one) == length]
        seen[layer] |= {(b, image.positions[0]) for b, image in bucket}
        for bucket_row, (b, image) in enumerate(bucket):
            if plan.gate is not None:
                whole = gates.get(layer, torch.ones(shape, dtype=plan.gate.dtype))
                places = torch.tensor(image.positions)[tokens.index[bucket_row]]
                own = torch.full_like(places, b), places
                gates[layer] = whole.index_put(own, plan.gate[bucket_row])
                continue
            if softens == "keys":
                whole = soft.get(layer, torch.zeros(shape, dtype=plan.soft.dtype))
                places = torch.tensor(image.positions)[tokens.index[bucket_row]]
                logs = plan.soft[bucket_row].clamp(min=math.exp(-10)).log()
                soft[layer] = whole.index_put((torch.full_like(places, b), places), logs)
                continue
            rows = found.setdefault(layer, {})
            if softens == "features":
                values = tokens.features[bucket_row] * plan.soft[bucket_row, :, None]
                places = torch.tensor(image.positions)[tokens.index[bucket_row]]
                rows |= {(b, p): v for p, v in zip(places.tolist(), values, strict=True)}
                continue
            for slot, place in enumerate(_rasters(tokens, plan)[bucket_row]):
                rows[b, image.positions[place]] = _new_value(tokens, plan, bucket_row, slot)
    out = {}
    for layer, rows in found.items():
        mask = torch.zeros(shape, dtype=torch.bool)
        for b, position in rows:
            mask[b, position] = True
        out[layer] = mask, torch.stack([rows[key] for key in sorted(rows)])
    return Values(out, gates | _sliced(report, spy, shape), soft)


def _sliced(
    report: CompressionReport, spy: Spy, shape: tuple[int, int]
) -> dict[int, Tensor | Sliced]:
    """What MLPs leave out for visual tokens, by layer."""
    if spy.computes is None:
        return {}
    visual = torch.zeros(shape, dtype=torch.bool)
    for b, sample in enumerate(report.samples):
        for image in sample.images:
            visual[b, list(image.positions)] = True
    layers = enumerate(spy.computes.compute(report.num_layers))
    return {n: Sliced(visual, own.ffn_ratio) for n, own in layers if own.ffn_ratio > 1}


def _bucket_images(
    report: CompressionReport, tokens: VisualTokens, documents: Tensor
) -> list[tuple[int, Any]]:
    """Images of a bucket in order: those with its N, grid (which tells layouts of equal N) and,
    where the text is read, as much of it.
    """
    text = tokens.text_embeddings
    return [
        (b, image)
        for b, sample in enumerate(report.samples)
        for image in sample.images
        if (image.num_visual, image.grid) == (tokens.num_original, tokens.grid)
        and (
            text is None
            or _texts(report, documents, b, image) == (text.shape[1], tokens.text_after)
        )
    ]


def _rasters(tokens: VisualTokens, plan: TokenPlan) -> list[list[int]]:
    """Raster indices of what a plan keeps of each image."""
    pairs = zip(tokens.index, plan.keep, strict=True)
    return [index[keep].tolist() for index, keep in pairs]


def _left(image: Any, layer: int) -> list[int]:
    """Raster indices of what a report's image has left behind its placement before `layer`."""
    return next(list(p.kept) for p in image.placements if p.layer == layer)


def _texts(report: CompressionReport, documents: Tensor, b: int, image: Any) -> tuple[int, int]:
    """Text tokens of an image's document, and those behind the image."""
    text = report.alive(0)[b] & (documents[b] == documents[b, image.positions[0]])
    for other in report.samples[b].images:
        text[list(other.positions)] = False
    return int(text.sum()), int(text[max(image.positions) + 1 :].sum())


def _new_value(tokens: VisualTokens, plan: TokenPlan, row: int, slot: int) -> Tensor:
    if plan.features is not None:
        return plan.features[row, slot]
    assert plan.assign is not None
    assert plan.weight is not None
    source = tokens.features
    if plan.merge_on == "vision_features":
        assert tokens.vision_features is not None
        source = tokens.vision_features
    members = plan.assign[row] == slot
    if plan.merge_on == "vision_features" and int(members.sum()) == 1:
        return tokens.features[row][members][0]
    merged = (plan.weight[row][members, None].to(source.dtype) * source[row][members]).sum(0)
    if plan.merge_on == "features":
        return merged
    assert tokens.projector is not None
    return tokens.projector(merged[None])[0]
