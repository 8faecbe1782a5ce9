"""Part `laws`: laws 1 to 5 on tiny random models of every family, in fp32 and bf16, on the device.

The tests of `tests/laws` run in fp64 on a CPU; here the same oracle judges other dtypes, kernels
that are launched, and tensors of the device. In fp32 the tolerance on logits of scale 20 is 1e-3.
In bf16 the compressed model may err twice as much against the fp32 oracle (same weights, same kept
tokens) as the bf16 oracle does. A shard, a family in one dtype, is a process of its own.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from tests.laws import cases
from tests.laws.oracle import oracle_expand, oracle_forward
from tests.tiny import Sample, Text, build, make_inputs
from tests.tiny_models import IMAGE_ID, VIDEO_ID
from torch import Tensor

from benchmarks.gpu.budgets import by_importance
from benchmarks.gpu.changed import carried, changed, last_run, of_method, of_runtime
from benchmarks.gpu.record import Deadline, Part, Row, Settings, measured
from benchmarks.gpu.shards import run_shards, workers_for
from vispress import compressed, compression_report

FP32_TOLERANCE = 1e-3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAMPLES = {"pictures": cases.SAMPLES, "videos": cases.VIDEO_SAMPLES}
DRY = {"families": ("llava", "qwen2_5_vl"), "methods": ("fastv", "visionzip", "evs")}
WORKERS = 14
Check = Callable[["_Bed", str], Row]


class _Bed:
    """A family in one dtype on the device, with pictures or videos of the law tests."""

    def __init__(
        self, family: str, dtype: torch.dtype, device: torch.device, samples: Sequence[Sample]
    ) -> None:
        self.family, self.dtype, self.device, self.samples = family, dtype, device, samples
        self.model = build(family, dtype=dtype).to(device)
        self.inputs = self.to(make_inputs(family, samples, padding="left", dtype=dtype))
        self.real = self.inputs["attention_mask"].bool()

    def to(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs on the device."""
        return {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in inputs.items()}

    def options(self, method: str, **more: Any) -> dict[str, Any]:
        """Arguments of `compress_model`."""
        return {"method": method} | cases.settings(self.family, method, **more)

    # what methods share; none of it is compressed

    @cached_property
    def plain(self) -> Tensor:
        """Logits of the batch."""
        return cases.logits_of(self.model, self.inputs)

    @cached_property
    def hooks(self) -> int:
        """Hooks of the model, behind its first forward (transformers leaves some of its own)."""
        return _hooks(self.model) if self.plain is not None else 0

    @cached_property
    def text(self) -> tuple[dict[str, Any], Tensor]:
        """A prompt without images, and its logits."""
        only = self.to(make_inputs(self.family, [Sample([Text(9)])], dtype=self.dtype))
        return only, cases.logits_of(self.model, only)

    @cached_property
    def singles(self) -> list[dict[str, Any]]:
        """Each sample of the batch alone."""
        made = (
            make_inputs(self.family, self.samples, only=index, dtype=self.dtype)
            for index in range(len(self.samples))
        )
        return [cases.real_positions(self.family, self.to(inputs)) for inputs in made]

    @cached_property
    def wide(self) -> tuple[Any, dict[str, Any]]:
        """Model and inputs in fp32, of the same weights."""
        inputs = {k: v.float() if v.is_floating_point() else v for k, v in self.inputs.items()}
        return copy.deepcopy(self.model).float(), inputs


def run_part(settings: Settings, deadline: Deadline) -> Part:
    """A row for each law, dtype, family and method; `ok` says whether it held.

    Methods that changed since the last run come first. Where the runtime did not, laws that held
    for the others are carried over.
    """
    part = Part("laws", settings, deadline)
    if part.complete:
        return part
    families = DRY["families"] if settings.dry else cases.FAMILIES
    last = last_run("laws", settings)
    digests = {"runtime": of_runtime()} | {method: of_method(method) for method in cases.METHODS}
    new = changed(last, digests)
    still = {} if "runtime" in new else carried(last, lambda row: bool(row.get("ok")))
    names = {
        f"{kind}/{family}/{what}": sorted(rows, key=lambda name: _method(name) not in new)
        for what in SAMPLES
        for kind in DTYPES
        for family in families
        if (rows := _names(kind, family, what, dry=settings.dry))
    }
    for name in (name for rows in names.values() for name in rows):
        if name in still and _method(name) not in new and part.find(name) is None:
            part.rows.append(still[name])
    workers = 1 if settings.dry else workers_for(WORKERS)
    if workers == 1:
        for shard, rows in names.items():
            for name, check in _checks(shard, rows, settings.device):
                part.row(name, check)
    else:
        run_shards(part, names, partial(_work, settings.device.type), workers)
    part.extra = {"held_and_broken": _counts(part.rows), "workers": workers, "digests": digests}
    part.finish()
    return part


def _names(kind: str, family: str, what: str, *, dry: bool) -> list[str]:
    """Rows of a shard, method by method, so that every law is touched early."""
    table = cases.CASES if what == "pictures" else cases.VIDEO_CASES
    fitting = [method for own, method in table if own == family]
    return [
        f"{law}/{kind}/{family}/{method}"
        for method in by_importance(fitting)
        if not dry or method in DRY["methods"]
        for law in LAWS
        if not (law == "law2" and method in cases.NO_BUDGET)
        and not (law == "law1" and method in cases.MASKING)  # rows that live are not all it changes
        and not (law == "law4" and kind == "bf16")  # near ties may fall either way
    ]


def _method(name: str) -> str:
    return name.rpartition("/")[2]


def _counts(rows: Sequence[Row]) -> dict[str, list[int]]:
    counts = {name: [0, 0] for name in LAWS}
    for row in rows:
        counts[row["name"].split("/")[0]][0 if row.get("ok") else 1] += 1
    return counts


def _checks(
    shard: str, names: Sequence[str], device: torch.device
) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Names and what measures them; the model is built with the first."""
    kind, family, what = shard.split("/")
    made: list[_Bed] = []

    def held(law: str, method: str) -> Row:
        if not made:
            made.append(_Bed(family, DTYPES[kind], device, SAMPLES[what]))
        return LAWS[law](made[0], method)

    for name in names:
        law, *_, method = name.split("/")
        yield name, partial(held, law, method)


def _work(device: str, shard: str, names: Sequence[str]) -> Iterator[Row]:
    """A shard in a process of its own."""
    torch.set_num_threads(1)
    for name, check in _checks(shard, names, torch.device(device)):
        row = measured(name, check)
        yield row
        if any(sign in row.get("error", "") for sign in ("CUDA error", "illegal")):
            return  # the process can no longer use the device


def prune_equals_mask(bed: _Bed, method: str) -> Row:
    """Law 1: the prefill's logits are those of the masked model."""
    compressor = cases.make(bed.family, method)
    result = cases.run(bed.model, bed.inputs, compressor)
    alive = [mask.to(bed.device) for mask in result.alive]
    positions: Any = result.positions
    values = {k: (m.to(bed.device), v.to(bed.device)) for k, (m, v) in result.values.items()}

    def oracle(model: Any, inputs: dict[str, Any]) -> Tensor:
        # where the method merges in the encoder, the masked model sees what that encoder gave
        with cases.encoding_as(model, result.encoded), torch.no_grad():
            masked = oracle_forward(model, inputs, alive, positions, values)
        return oracle_expand(masked, alive[-1])[bed.real].double()

    got, same = result.logits[bed.real].double(), oracle(bed.model, bed.inputs)
    worst = float((got - same).abs().max())
    if bed.dtype == torch.float32:
        return {"ok": worst < FP32_TOLERANCE, "max_difference": worst}
    exact = oracle(*bed.wide)
    mine = float((got - exact).norm() / exact.norm())
    allowed = 2 * float((same - exact).norm() / exact.norm())
    return {
        "ok": mine <= allowed,
        "relative_error": mine,
        "allowed": allowed,
        "max_difference": worst,
    }


def whole_is_identity(bed: _Bed, method: str) -> Row:
    """Law 2: keep_ratio=1 is bit-equal."""
    plain, inputs = bed.plain, bed.inputs
    with compressed(bed.model, **bed.options(method, keep_ratio=1.0)):
        same = torch.equal(cases.logits_of(bed.model, inputs), plain)
    return {"ok": same}


def removal_leaves_nothing(bed: _Bed, method: str) -> Row:
    """Law 3: outputs bit-equal, no hook left."""
    plain, hooks = bed.plain, bed.hooks
    with compressed(bed.model, **bed.options(method)):
        changed = not torch.equal(cases.logits_of(bed.model, bed.inputs), plain)
    same = torch.equal(cases.logits_of(bed.model, bed.inputs), plain)
    return {"ok": same and changed and _hooks(bed.model) == hooks, "changed_inside": changed}


def batched_equals_alone(bed: _Bed, method: str) -> Row:
    """Law 4: same kept tokens, and logits within the tolerance."""
    options, worst, same = bed.options(method), 0.0, True
    with compressed(bed.model, **options):
        together = cases.logits_of(bed.model, cases.real_positions(bed.family, bed.inputs))
        kept = [_kept(s) for s in compression_report(bed.model).samples]
        for index, single in enumerate(bed.singles):
            alone = cases.logits_of(bed.model, single)[0]
            if kept[index]:  # a text-only prompt leaves no report of its own
                same &= kept[index] == _kept(compression_report(bed.model).samples[0])
            own = together[index][bed.real[index]]
            worst = max(worst, float((own - alone).abs().max()))
    return {"ok": same and worst < FP32_TOLERANCE, "same_kept": same, "max_difference": worst}


def text_survives(bed: _Bed, method: str) -> Row:
    """Law 5: no text token is dropped; text-only input is bit-equal."""
    only, plain = bed.text
    ids = bed.inputs["input_ids"]
    text = (bed.real & (ids != IMAGE_ID) & (ids != VIDEO_ID)).cpu()
    with compressed(bed.model, **bed.options(method)):
        cases.logits_of(bed.model, bed.inputs)
        report = compression_report(bed.model)
        masks = [report.alive(layer).cpu() for layer in range(report.num_layers)]
        same = torch.equal(cases.logits_of(bed.model, only), plain)
    there = all(bool(mask[text].all()) for mask in masks)
    padding = any(bool(mask[~bed.real.cpu()].any()) for mask in masks)
    return {"ok": there and same and not padding, "text_kept": there, "text_only_equal": same}


def _kept(sample: Any) -> list[tuple[tuple[int, ...], ...]]:
    return [tuple(p.kept for p in image.placements) for image in sample.images]


def _hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


LAWS: dict[str, Check] = {
    "law1": prune_equals_mask,
    "law2": whole_is_identity,
    "law3": removal_leaves_nothing,
    "law4": batched_equals_alone,
    "law5": text_survives,
}
