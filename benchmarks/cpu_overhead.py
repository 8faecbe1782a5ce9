"""What choosing tokens costs on a CPU, as a share of the uncompressed prefill.

    python benchmarks/cpu_overhead.py                 # 300M parameters, every method, two budgets
    python benchmarks/cpu_overhead.py --methods fastv,divprune --rounds 5
    python benchmarks/cpu_overhead.py --dry-run       # tiny, seconds
    python benchmarks/cpu_overhead.py --processes 8   # on a machine with so many cores or more

A random-weight LLaVA: an encoder like CLIP-L with 12 layers and 576 tokens, an LLM of 24 layers,
1024 wide. Each round times the uncompressed model, the method and `random` with the same budget,
one after the other; ratios are taken within a round. Several processes share caches and memory:
their times are longer, their shares are still of one moment. Two estimates of a method's overhead:

* `overhead_share`: time inside vispress's own hooks (signals, scores, choice, gather, merge,
  expand) over the uncompressed prefill;
* `beyond_random_share`: prefill beyond that of `random`, which scores nothing, over the same.

Methods that score by a probe pass (`Placement.probe`) may take more than the limit, by definition.
Methods that prune inside the LLM keep more than `random` before the LLM does, so only the first
estimate holds for them; `beyond_random_share` is left out there.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.record import Part

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "cpu_overhead.json"
RATIOS = (0.25, 0.5)
LIMIT = 0.03


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the file, print a table; 1 when a method misses a target."""
    options = _parse(arguments)
    _prepare()
    import torch

    from benchmarks.gpu.record import Deadline, Part, Settings, identity

    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    path: Path = options.out
    tied = identity(device, options.dry_run) | {"threads": options.threads}
    settings = Settings(device, path.parent, options.dry_run, tied, options.force)
    part = Part(path.stem, settings, Deadline(options.limit_s))
    part.extra = {"limit": LIMIT, "dtype": "float32", "attention": "sdpa"}
    part.extra["processes"] = options.processes
    names = [f"{method}/{ratio}" for method, ratio in _cases(options)]
    if options.processes > 1:
        _in_processes(part, names, options)
    else:
        for name, measure in _measures(options.rounds, options.dry_run, names):
            part.row(name, measure)
    part.extra["load_average_at_the_end"] = os.getloadavg()
    part.finish()
    _show(part.rows)
    if part.not_reached:
        print(f"not reached: {', '.join(part.not_reached)}; the same command goes on from here")
    missed = [row for row in part.rows if "error" in row or not row.get("ok", True)]
    return int(bool(missed) and not options.dry_run)


def _in_processes(part: "Part", names: Sequence[str], options: argparse.Namespace) -> None:
    from benchmarks.gpu.shards import run_shards

    count = 2 * options.processes  # methods take different times
    shards = {str(first): names[first::count] for first in range(count)}
    work = partial(_work, options.threads, options.rounds, options.dry_run)
    run_shards(part, shards, work, options.processes)


def _work(
    threads: int, rounds: int, dry: bool, _shard: str, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Rows in a process of its own."""
    _prepare()
    import torch

    from benchmarks.gpu.record import measured

    torch.set_num_threads(threads)
    for name, measure in _measures(rounds, dry, names):
        yield measured(name, measure)


def _measures(
    rounds: int, dry: bool, names: Sequence[str]
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names and what measures them; the model is built with the first."""
    made: list[tuple[Any, dict[str, Any]]] = []

    def measure(method: str, ratio: float) -> dict[str, Any]:
        if not made:
            made.append(_subject(dry))
        return _measure(*made[0], method, ratio, rounds)

    for name in names:
        method, ratio = name.split("/")
        yield name, partial(measure, method, float(ratio))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file")
    parser.add_argument("--methods", default="", help="names, with commas; all by default")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds")
    parser.add_argument("--threads", type=int, default=1, help="of a process")
    parser.add_argument("--processes", type=int, default=1, help="that measure at a time")
    parser.add_argument("--limit-s", type=float, default=1800, help="start no row after this")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, one round")
    options = parser.parse_args(arguments)
    if options.dry_run:
        options.rounds = 1
        if options.out == OUT:
            options.out = Path(tempfile.gettempdir()) / "vispress-cpu-overhead-dry-run.json"
    return options


def _prepare() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for folder in (ROOT / "kernels", ROOT / "src", ROOT):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def _subject(dry: bool) -> tuple[Any, dict[str, Any]]:
    """The model, and one prompt with one image."""
    import torch

    from benchmarks.gpu import shapes

    shape = shapes.TINY_SHAPES["llava_1_5_7b"] if dry else shapes.CPU_SHAPE
    device = torch.device("cpu")
    model = shapes.build(shape, device, torch.float32)
    return model, shapes.prompt(shape, 1, device, torch.float32)


def _cases(options: argparse.Namespace) -> list[tuple[str, float]]:
    from benchmarks.gpu.budgets import fitting

    names = [name for name in options.methods.split(",") if name] or fitting(crops=1)
    if options.dry_run and not options.methods:
        names = ["divprune", "fastervlm", "fastv", "pyramiddrop"]
    cases: dict[str, tuple[str, float]] = {}
    for name in names:
        for ratio in RATIOS:  # where a method takes no ratio, both are the same case
            cases.setdefault(repr(_options_of(name, ratio)), (name, ratio))
    return list(cases.values())


def _options_of(method: str, ratio: float) -> dict[str, Any]:
    """In-LLM schedules read the ratio as a mean; where their first layer forbids it, theirs."""
    from benchmarks.gpu.budgets import compressor_of

    options: dict[str, Any] = {"method": method, "keep_ratio": ratio}
    if method == "no_image":
        options.pop("keep_ratio")
        return options
    try:
        compressor_of(options).placements(24)
    except ValueError:
        options.pop("keep_ratio")
    return options


def _measure(
    model: Any, inputs: dict[str, Any], method: str, ratio: float, rounds: int
) -> dict[str, Any]:
    from benchmarks.gpu.budgets import compressor_of
    from benchmarks.gpu.overhead import one_round, warm_up
    from benchmarks.gpu.record import quantiles

    options = _options_of(method, ratio)
    subject = compressor_of(options)
    control = compressor_of({"method": "random", "keep_ratio": ratio})
    warm_up(model, inputs, subject)
    done = [one_round(model, inputs, subject, control) for _ in range(rounds)]
    base = [r["uncompressed"] for r in done]

    def shares(name: str, less: str | None = None) -> dict[str, float]:
        values = [(r[name] - (r[less] if less else 0.0)) / r["uncompressed"] for r in done]
        return quantiles(values)

    found: dict[str, Any] = {
        "method": method,
        "options": {k: v for k, v in options.items() if k != "method"},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "uncompressed_ms": quantiles(base),
        "compressed_ms": quantiles([r["compressed"] for r in done]),
        "hooks_ms": quantiles([r["hooks"] for r in done]),
        "plan_ms": quantiles([r["plan"] for r in done]),
        "prefill_ratio": shares("compressed"),
        "overhead_share": shares("hooks"),
    }
    if all(place.layer == 0 for place in subject.placements(24)):
        found["beyond_random_share"] = shares("compressed", "control")
    # a probe runs decoder layers on the whole prompt: its overhead is shown, not judged
    found["probe"] = any(place.probe is not None for place in subject.placements(24))
    cheap = found["probe"] or found["overhead_share"]["median"] <= LIMIT
    return found | {"ok": cheap and found["prefill_ratio"]["median"] < 1.0}


def _show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'method/ratio':24} {'prefill':>8} {'overhead':>9} {'plan ms':>8} {'> random':>9}  ok")
    for row in rows:
        if "error" in row:
            print(f"{row['name']:24} {row['error'][:100]}")
            continue
        beyond = row.get("beyond_random_share")
        print(
            f"{row['name']:24} {row['prefill_ratio']['median']:8.3f} "
            f"{row['overhead_share']['median']:9.2%} {row['plan_ms']['median']:8.2f} "
            f"{'-' if beyond is None else format(beyond['median'], '.2%'):>9}  {row['ok']}"
        )


if __name__ == "__main__":
    sys.exit(main())
