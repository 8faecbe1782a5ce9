"""The table that laws run over: every registered method on every family, and the prompts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any

import torch
from tests.tiny import FAMILIES, QWEN, VIDEO, Image, Sample, Text, Video, build, make_inputs
from torch import Tensor

from vispress import compress_model, compression_report, list_methods, remove_compression
from vispress.adapters.base import find_adapter
from vispress.methods.base import Compressor
from vispress.methods.pair_masker import PairMasker
from vispress.registry import get_method
from vispress.report import CompressionReport
from vispress.types import CLS_SIGNALS, Placement, TokenPlan, VisualTokens

METHODS = tuple(list_methods())
NO_BUDGET = frozenset(name for name in METHODS if not get_method(name).takes_budget)
"""Methods that take no budget; a contract test holds them to it."""

SETTINGS: dict[str, dict[str, Any]] = {
    name: {}
    for name in (
        *sorted(NO_BUDGET),
        "adsc",
        "pyramiddrop",
        "sparsevlm",
        "sparsevlm_plus",
        "transprune",
    )
}
"""What `compress_model` gets beside the name; others get a ratio."""

VIDEO_ONLY = frozenset(name for name in METHODS if get_method(name).needs == "video")
"""Methods that leave the images of the common batch whole; laws on videos run over them."""

# two images and one, a text-only sample, unequal lengths; sizes differ where the family allows it
SAMPLES = (
    Sample([Text(5), Image(4, 4), Text(7)]),
    Sample([Text(3)]),
    Sample([Text(2), Image(4, 6), Text(3), Image(6, 4), Text(4)]),
)
VIDEO_SAMPLES = (
    Sample([Text(3), Video(3, 4, 4), Text(6)]),
    Sample([Text(2), Video(3, 4, 6), Text(3)]),
)
VIDEO_CASES = [(family, method) for family in VIDEO for method in sorted(VIDEO_ONLY)]


@cache
def model_of(family: str, dtype: torch.dtype = torch.float64, attn: str = "sdpa") -> Any:
    """One model a family; tests must leave it as they found it."""
    return build(family, dtype=dtype, attn=attn)


def fits(family: str, method: str) -> bool:
    """Whether the family has the kind of input that the method is made for."""
    needs = get_method(method).needs
    return needs is None or needs in find_adapter(model_of(family)).kinds


def on_videos() -> list[tuple[str, str]]:
    """Every method on every family that takes videos."""
    return [(f, m) for f in FAMILIES if f in VIDEO for m in METHODS if fits(f, m)]


CASES = [
    (family, method)
    for family in FAMILIES
    for method in METHODS
    if method not in VIDEO_ONLY and fits(family, method)
]

MASKING = frozenset(name for name in METHODS if issubclass(get_method(name), PairMasker))
"""Methods that drop nothing; `test_pair_masks` has the masked model that they equal."""
DROPPING = [case for case in CASES if case[1] not in MASKING]
DROPS = [name for name in METHODS if name not in MASKING]


@cache
def inputs_of(
    family: str, padding: str = "left", dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """The common batch of a family."""
    return make_inputs(family, SAMPLES, padding=padding, dtype=dtype)


def settings(family: str, method: str, **more: Any) -> dict[str, Any]:
    """Arguments that make `method` run on `family` (with the documented [CLS] substitute)."""
    chosen = dict(SETTINGS.get(method, {"keep_ratio": 0.4})) | more
    adapter = find_adapter(model_of(family))
    if get_method(method).reads & CLS_SIGNALS and not adapter.has_cls:
        chosen["scores"] = "column_mean"
    return chosen


class Spy:
    """Notes every plan of a compressor (installed on a copy of its class, never on the
    original).
    """

    def __init__(self) -> None:
        self.seen: list[tuple[VisualTokens, TokenPlan]] = []
        self.layers: list[int] = []

    def watch(self, method: Compressor) -> Compressor:
        """A compressor that behaves the same and tells."""
        seen, layers = self.seen, self.layers
        placements: list[Placement] = []

        class Watched(type(method)):  # type: ignore[misc]
            def placements(self, num_layers: int) -> tuple[Placement, ...]:
                found: tuple[Placement, ...] = super().placements(num_layers)
                placements[:] = found
                return found

            def plan(self, tokens: VisualTokens, num_keep: int) -> TokenPlan:
                plan = super().plan(tokens, num_keep)
                seen.append((tokens, plan))
                # the first of equal budgets: a later one keeps all and asks for no plan
                size = tokens.num_original
                stages = (p.layer for p in placements if p.budget.resolve(size) == num_keep)
                told = placements[0].layer if tokens.depth is None else tokens.depth[0]
                layers.append(told if tokens.depth else next(stages, told))
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

    @property
    def alive(self) -> list[Tensor]:
        """Alive positions of each decoder layer."""
        return [self.report.alive(layer) for layer in range(self.report.num_layers)]


def make(family: str, method: str, **more: Any) -> Compressor:
    """The compressor of a case."""
    from vispress.config import make_compressor

    return make_compressor(method, **settings(family, method, **more))


def run(
    model: Any, inputs: Mapping[str, Any], method: Compressor | Sequence[Compressor], **options: Any
) -> Run:
    """Compress, run a forward, read the report, take it off again."""
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
    values: dict[int, tuple[Tensor, Tensor]] = {}
    for spy in spies:
        values |= changed_rows(report, spy, logits.shape[:2])
    return Run(logits, report, options.get("positions") or default, values, encoded)


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
    if any(method.encoder_merger() is not None for method in chain):
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


def changed_rows(
    report: CompressionReport, spy: Spy, shape: tuple[int, int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """New values of merged or replaced tokens by layer, worked out from the plans, row by row."""
    found: dict[int, dict[tuple[int, int], Tensor]] = {}
    seen: dict[int, set[tuple[int, int]]] = {}
    for (tokens, plan), layer in zip(spy.seen, spy.layers, strict=True):
        if plan.features is None and plan.assign is None:
            continue
        rows = found.setdefault(layer, {})
        bucket = [
            (b, image)
            for b, image in _bucket_images(report, tokens)
            if (b, image.positions[0]) not in seen.setdefault(layer, set())
        ]
        if tokens.memory:  # rows part at earlier placements, and some ask for no plan any more
            bucket = [one for one in bucket if _left(one[1], layer) == _rasters(tokens, plan)[0]]
        if len(bucket) > tokens.batch:  # texts are read: equally long ones are a bucket
            length = _texts(report, *bucket[0])
            bucket = [one for one in bucket if _texts(report, *one) == length]
        seen[layer] |= {(b, image.positions[0]) for b, image in bucket}
        for bucket_row, (b, image) in enumerate(bucket):
            for slot, place in enumerate(_rasters(tokens, plan)[bucket_row]):
                rows[b, image.positions[place]] = _new_value(tokens, plan, bucket_row, slot)
    out = {}
    for layer, rows in found.items():
        mask = torch.zeros(shape, dtype=torch.bool)
        for b, position in rows:
            mask[b, position] = True
        out[layer] = mask, torch.stack([rows[key] for key in sorted(rows)])
    return out


def _bucket_images(report: CompressionReport, tokens: VisualTokens) -> list[tuple[int, Any]]:
    """Images of a bucket in order: those with its N, grid (which tells layouts of equal N) and,
    where the text is read, as much of it.
    """
    text = tokens.text_embeddings
    return [
        (b, image)
        for b, sample in enumerate(report.samples)
        for image in sample.images
        if (image.num_visual, image.grid) == (tokens.num_original, tokens.grid)
        and (text is None or _texts(report, b, image) == (text.shape[1], tokens.text_after))
    ]


def _rasters(tokens: VisualTokens, plan: TokenPlan) -> list[list[int]]:
    """Raster indices of what a plan keeps of each image."""
    pairs = zip(tokens.index, plan.keep, strict=True)
    return [index[keep].tolist() for index, keep in pairs]


def _left(image: Any, layer: int) -> list[int]:
    """Raster indices of what a report's image has left behind its placement before `layer`."""
    return next(list(p.kept) for p in image.placements if p.layer == layer)


def _texts(report: CompressionReport, b: int, image: Any) -> tuple[int, int]:
    """Text tokens of an image's sample, and those behind the image."""
    text = report.alive(0)[b].clone()
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


def real_positions(family: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with position ids that do not count padding, as `generate` gives them.

    Qwen models work them out by themselves; others count padding in when they are left to it.
    """
    if family in QWEN:
        return dict(inputs)
    ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return dict(inputs) | {"position_ids": ids}


def logits_of(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Logits of a forward without gradients."""
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[no-any-return]


def greedy(model: Any, inputs: Mapping[str, Any], new_tokens: int = 3) -> tuple[Tensor, Tensor]:
    """Sequences and the logits of every step of greedy decoding."""
    out = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits, dim=1)


__all__ = [
    "CASES",
    "DROPPING",
    "DROPS",
    "FAMILIES",
    "MASKING",
    "METHODS",
    "QWEN",
    "SAMPLES",
    "VIDEO_ONLY",
    "Run",
    "Spy",
    "changed_rows",
    "encoding_as",
    "greedy",
    "inputs_of",
    "logits_of",
    "make",
    "model_of",
    "noting",
    "on_videos",
    "real_positions",
    "run",
    "settings",
]
