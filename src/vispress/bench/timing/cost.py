"""Costs and savings of compression, interleaved with the uncompressed model.

Turns make ratios hold on a machine whose speed drifts: each round times every variant, every other
round in the opposite order, and ratios are taken within the round.

The variants are the uncompressed model, the compressed one, and a replay of it: a compressor that
reads no signals and keeps what was kept before. Method overhead is what the method's encoder and
prefill take longer than the replay's: reading attention or features, scoring, selecting, merging.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from vispress.bench.model.loaded_model import LoadedModel
from vispress.bench.plan.downsample import Downsample, any_size, smaller
from vispress.bench.plan.plan import Plan, Timing
from vispress.bench.plan.saved import compressed_by
from vispress.bench.results.stats import quantiles
from vispress.bench.tasks.task import Prompt
from vispress.bench.timing.memory import peak_bytes
from vispress.bench.timing.replay import recorders, replays
from vispress.bench.timing.timer import Sample, Timer, timed_generate
from vispress.config import make_compressor
from vispress.methods.base import Compressor
from vispress.report import CompressionReport
from vispress.weights import SavedCompressor

Variants = Mapping[str, Callable[[], AbstractContextManager[Any]]]
Round = Mapping[str, Sequence[Sample]]

BASE, KEPT, REPLAY = "uncompressed", "compressed", "replay"
TIMES: Mapping[str, Callable[[Sample], Any]] = {
    "encoder": lambda sample: sample.encoder_ms,
    "prefill": lambda sample: sample.prefill_ms,
    "ttft": lambda sample: sample.ttft_ms,
    "decode": lambda sample: sample.decode_ms,
}
"""The times that are reported, as `<name>_ms`, `uncompressed_<name>_ms` and `<name>_ratio`."""


def timed_batch(loaded: LoadedModel, prompts: Sequence[Prompt], size: int) -> list[Prompt]:
    """Choose up to `size` prompts of the commonest length, so that no padding is timed.

    Prompts without pictures and videos are left out; where all are, the batch is empty.
    """
    alike: dict[tuple[int, int, int], list[Prompt]] = {}
    for prompt in prompts:
        if prompt.visuals:
            ids = loaded.processor.tokenizer(prompt.text)["input_ids"]
            shown = len(prompt.images), len(prompt.videos)
            alike.setdefault((*shown, len(ids)), []).append(prompt)
    return max(alike.values(), key=len, default=[])[:size]


@dataclass(frozen=True)
class _Setup:
    """Variants to run in turns, with their inputs.

    Args:
        variants: Entered around the runs of each.
        inputs: Of each.
        whole: Report of the uncompressed prefill.
        kept: Of the compressed one.
    """

    variants: Variants
    inputs: Mapping[str, Any]
    whole: CompressionReport
    kept: CompressionReport


def measure_cost(
    loaded: LoadedModel,
    chain: Sequence[Compressor],
    prompts: Sequence[Prompt],
    plan: Plan,
    *,
    picture: Downsample | None = None,
    saved: SavedCompressor | None = None,
    timer: Timer | None = None,
) -> dict[str, Any]:
    """Time one batch both ways, and size caches, peak memory and FLOPs.

    Args:
        loaded: The model, uncompressed.
        chain: What compresses it; none measures the uncompressed model against itself, which
            shows how much of a ratio is noise.
        prompts: One batch of equal length.
        plan: Positions and timing.
        picture: Smaller pictures in place of a chain.
        saved: Parameters of the chain.
        timer: In place of the one for the model's device.

    Returns:
        Plain data. Spreads are mappings of `p20`, `median` and `p80`: for each of `TIMES`
        (`Sample` says what they span) milliseconds a batch both ways and the ratio;
        `overhead_ms` and `overhead_share`, of the uncompressed prefill, which noise can make
        negative (None without a chain). Numbers: `batch`, `prompt_tokens`; `kv_bytes` and
        `uncompressed_kv_bytes` of a prompt after its prefill; `peak_bytes` and
        `uncompressed_peak_bytes` of a batch up to its first token, beyond weights and inputs;
        `flops` of a prompt's visual tokens by convention: `compressed`, `uncompressed`, `ratio`.
    """
    setup = _set_up(loaded, chain, prompts, plan, picture, saved)
    timer = timer or Timer(loaded.device)

    def run(name: str) -> Sample:
        tokens = 0 if name == REPLAY else plan.timing.decode_tokens
        return timed_generate(loaded.model, setup.inputs[name], tokens, timer)

    rounds = in_rounds(setup.variants, run, plan.timing)
    count = len(prompts)
    return {
        "batch": count,
        "prompt_tokens": setup.inputs[BASE]["input_ids"].shape[1],
        **_times(rounds),
        **_overhead(rounds),
        **_peaks(loaded, setup),
        "kv_bytes": setup.kept.kv_bytes / count,
        "uncompressed_kv_bytes": setup.whole.kv_bytes / count,
        "flops": {
            name: {
                "compressed": setup.kept.flops[name].compressed / count,
                "uncompressed": cost.uncompressed / count,
                "ratio": setup.kept.flops[name].compressed / cost.uncompressed,
            }
            for name, cost in setup.whole.flops.items()
        },
    }


def _set_up(
    loaded: LoadedModel,
    chain: Sequence[Compressor],
    prompts: Sequence[Prompt],
    plan: Plan,
    picture: Downsample | None,
    saved: SavedCompressor | None,
) -> _Setup:
    model, positions, inputs = loaded.model, plan.positions, loaded.encode(prompts)
    everything = make_compressor("random", keep_ratio=1.0)  # a report of the untouched model
    whole = _prefilled(model, inputs, [everything], plan)
    if picture is not None:
        small = smaller(picture, loaded, inputs, prompts).inputs
        with any_size(model):
            kept = _prefilled(model, small, [everything], plan)
        variants: Variants = {BASE: nullcontext, KEPT: partial(any_size, model)}
        return _Setup(variants, {BASE: inputs, KEPT: small}, whole, kept)
    if not chain:
        variants = {BASE: nullcontext, KEPT: nullcontext}
        return _Setup(variants, dict.fromkeys(variants, inputs), whole, whole)
    recording, logs = recorders(chain)
    kept = _prefilled(model, inputs, recording, plan, saved)
    variants = {
        BASE: nullcontext,
        KEPT: partial(compressed_by, model, chain, saved, positions),
        REPLAY: lambda: compressed_by(model, replays(chain, logs), saved, positions),
    }
    return _Setup(variants, dict.fromkeys(variants, inputs), whole, kept)


def in_rounds(variants: Variants, run: Callable[[str], Sample], timing: Timing) -> list[Round]:
    """Sample every variant, round by round; the first round and the first runs are warm-up.

    Args:
        variants: What to enter around the runs of each.
        run: Takes one sample of the variant of this name.
        timing: Rounds and repeats.
    """
    rounds: list[Round] = []
    for number in range(timing.rounds):
        samples = {}
        for name in list(variants)[:: -1 if number % 2 else 1]:
            with variants[name]():
                samples[name] = [run(name) for _ in range(timing.repeats + 1)][1:]
        rounds.append(samples)
    return rounds[1:]


def _prefilled(
    model: Any,
    inputs: Any,
    chain: Sequence[Compressor],
    plan: Plan,
    saved: SavedCompressor | None = None,
) -> CompressionReport:
    """Report one prefill."""
    with compressed_by(model, chain, saved, plan.positions) as view:
        _first_token(model, inputs)
        return view.report


@torch.inference_mode()
def _first_token(model: Any, inputs: Any) -> None:
    model.generate(**inputs, max_new_tokens=1, do_sample=False)


def _peaks(loaded: LoadedModel, setup: _Setup) -> dict[str, int]:
    peaks = {}
    for name in (BASE, KEPT):
        call = partial(_first_token, loaded.model, setup.inputs[name])
        with setup.variants[name]():
            call()
            peaks[name] = peak_bytes(loaded.device, call)
    return {"peak_bytes": peaks[KEPT], "uncompressed_peak_bytes": peaks[BASE]}


def _times(rounds: Sequence[Round]) -> dict[str, Any]:
    """Compute milliseconds of all samples and ratios of the rounds' medians; None if not run."""
    out: dict[str, Any] = {}
    for name, pick in TIMES.items():
        if pick(rounds[0][BASE][0]) is None:
            out |= {f"{name}_ms": None, f"uncompressed_{name}_ms": None, f"{name}_ratio": None}
            continue
        for prefix, variant in (("", KEPT), ("uncompressed_", BASE)):
            all_of_them = [pick(sample) for samples in rounds for sample in samples[variant]]
            out[f"{prefix}{name}_ms"] = asdict(quantiles(all_of_them))
        ratios = [_median(samples[KEPT], pick) / _median(samples[BASE], pick) for samples in rounds]
        out[f"{name}_ratio"] = asdict(quantiles(ratios))
    return out


def _overhead(rounds: Sequence[Round]) -> dict[str, Any]:
    """Subtract the replay's encoder and prefill times from the method's, within each round."""
    if REPLAY not in rounds[0]:
        return {"overhead_ms": None, "overhead_share": None}

    def work(sample: Sample) -> float:
        return sample.encoder_ms + sample.prefill_ms

    extra = [_median(samples[KEPT], work) - _median(samples[REPLAY], work) for samples in rounds]
    full = [_median(samples[BASE], TIMES["prefill"]) for samples in rounds]
    return {
        "overhead_ms": asdict(quantiles(extra)),
        "overhead_share": asdict(quantiles([a / b for a, b in zip(extra, full, strict=True)])),
    }


def _median(samples: Iterable[Sample], pick: Callable[[Sample], float]) -> float:
    return median(map(pick, samples))
