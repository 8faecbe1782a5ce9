"""What compression costs and saves, measured in turns with the uncompressed model.

Turns make ratios hold on a machine whose speed drifts: each round times every variant, every other
round in the opposite order, and ratios are taken within the round.

The variants are the uncompressed model, the compressed one, and a replay of it: a compressor that
reads no signals and keeps what was kept before. Method overhead is what the method's encoder and
prefill take longer than the replay's: reading attention or features, scoring, selecting, merging.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import torch

from vispress.api import compressed
from vispress.bench.clock import Clock, Sample, timed_generate
from vispress.bench.memory import peak_bytes
from vispress.bench.plan import Plan, Timing
from vispress.bench.replay import recorders, replays
from vispress.bench.stats import quantiles
from vispress.bench.subjects import Subject
from vispress.bench.tasks import Prompt
from vispress.config import make_compressor
from vispress.methods.base import Compressor
from vispress.report import CompressionReport

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


def timed_batch(subject: Subject, prompts: Sequence[Prompt], size: int) -> list[Prompt]:
    """Up to `size` prompts of the commonest length, so that no padding is timed."""
    by_length: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        ids = subject.processor.tokenizer(prompt.text)["input_ids"]
        by_length.setdefault(len(ids), []).append(prompt)
    return max(by_length.values(), key=len)[:size]


def measure_cost(
    subject: Subject,
    chain: Sequence[Compressor],
    prompts: Sequence[Prompt],
    plan: Plan,
    *,
    clock: Clock | None = None,
) -> dict[str, Any]:
    """Time one batch both ways, and size caches, peak memory and FLOPs.

    Args:
        subject: The model, uncompressed.
        chain: What compresses it; none measures the uncompressed model against itself, which
            shows how much of a ratio is noise.
        prompts: One batch of equal length.
        plan: Positions and timing.
        clock: In place of the one for the model's device.

    Returns:
        Plain data. Spreads are mappings of `p20`, `median` and `p80`: for each of `TIMES`
        (`Sample` says what they span) milliseconds a batch both ways and the ratio;
        `overhead_ms` and `overhead_share`, of the uncompressed prefill, which noise can make
        negative (None without a chain). Numbers: `batch`, `prompt_tokens`; `kv_bytes` and
        `uncompressed_kv_bytes` of a prompt after its prefill; `peak_bytes` and
        `uncompressed_peak_bytes` of a batch up to its first token, beyond weights and inputs;
        `flops` of a prompt's visual tokens by convention: `compressed`, `uncompressed`, `ratio`.
    """
    inputs = subject.encode(prompts)
    clock = clock or Clock(subject.device)
    positions = plan.positions
    whole = _prefilled(subject, inputs, [make_compressor("random", keep_ratio=1.0)], plan)
    report = whole
    variants: dict[str, Callable[[], AbstractContextManager[Any]]]
    variants = {BASE: nullcontext, KEPT: nullcontext}
    if chain:
        recording, logs = recorders(chain)
        report = _prefilled(subject, inputs, recording, plan)
        variants = {
            BASE: nullcontext,
            KEPT: partial(compressed, subject.model, list(chain), positions=positions),
            REPLAY: lambda: compressed(subject.model, replays(chain, logs), positions=positions),
        }
    decode = plan.timing.decode_tokens
    run = partial(timed_generate, subject.model, inputs, decode, clock)
    rounds = in_rounds(variants, run, plan.timing)
    count = len(prompts)
    return {
        "batch": count,
        "prompt_tokens": inputs["input_ids"].shape[1],
        **_times(rounds),
        **_overhead(rounds),
        **_peaks(subject, inputs, variants),
        "kv_bytes": report.kv_bytes / count,
        "uncompressed_kv_bytes": whole.kv_bytes / count,
        "flops": {
            name: {
                "compressed": cost.compressed / count,
                "uncompressed": cost.uncompressed / count,
                "ratio": cost.ratio,
            }
            for name, cost in report.flops.items()
        },
    }


def in_rounds(variants: Variants, run: Callable[[], Sample], timing: Timing) -> list[Round]:
    """Samples of every variant, round by round; the first round and the first runs are warm-up.

    Args:
        variants: What to enter around the runs of each.
        run: Takes one sample.
        timing: Rounds and repeats.
    """
    rounds: list[Round] = []
    for number in range(timing.rounds):
        found = {}
        for name in list(variants)[:: -1 if number % 2 else 1]:
            with variants[name]():
                found[name] = [run() for _ in range(timing.repeats + 1)][1:]
        rounds.append(found)
    return rounds[1:]


def _prefilled(
    subject: Subject, inputs: Any, chain: Sequence[Compressor], plan: Plan
) -> CompressionReport:
    """The report of one prefill."""
    with compressed(subject.model, list(chain), positions=plan.positions) as view:
        _first_token(subject, inputs)
        return view.report


@torch.inference_mode()
def _first_token(subject: Subject, inputs: Any) -> None:
    subject.model.generate(**inputs, max_new_tokens=1, do_sample=False)


def _peaks(subject: Subject, inputs: Any, variants: Variants) -> dict[str, int]:
    found = {}
    for name in (BASE, KEPT):
        with variants[name]():
            _first_token(subject, inputs)
            found[name] = peak_bytes(subject.device, lambda: _first_token(subject, inputs))
    return {"peak_bytes": found[KEPT], "uncompressed_peak_bytes": found[BASE]}


def _times(rounds: Sequence[Round]) -> dict[str, Any]:
    """Milliseconds of all samples, ratios of the rounds' medians; None for what was not run."""
    out: dict[str, Any] = {}
    for name, pick in TIMES.items():
        if pick(rounds[0][BASE][0]) is None:
            out |= {f"{name}_ms": None, f"uncompressed_{name}_ms": None, f"{name}_ratio": None}
            continue
        for prefix, variant in (("", KEPT), ("uncompressed_", BASE)):
            all_of_them = [pick(sample) for one in rounds for sample in one[variant]]
            out[f"{prefix}{name}_ms"] = asdict(quantiles(all_of_them))
        ratios = [_median(one[KEPT], pick) / _median(one[BASE], pick) for one in rounds]
        out[f"{name}_ratio"] = asdict(quantiles(ratios))
    return out


def _overhead(rounds: Sequence[Round]) -> dict[str, Any]:
    """Encoder and prefill of the method less those of the replay, within each round."""
    if REPLAY not in rounds[0]:
        return {"overhead_ms": None, "overhead_share": None}

    def work(sample: Sample) -> float:
        return sample.encoder_ms + sample.prefill_ms

    extra = [_median(one[KEPT], work) - _median(one[REPLAY], work) for one in rounds]
    full = [_median(one[BASE], TIMES["prefill"]) for one in rounds]
    return {
        "overhead_ms": asdict(quantiles(extra)),
        "overhead_share": asdict(quantiles([a / b for a, b in zip(extra, full, strict=True)])),
    }


def _median(samples: Iterable[Sample], pick: Callable[[Sample], float]) -> float:
    return median(map(pick, samples))
