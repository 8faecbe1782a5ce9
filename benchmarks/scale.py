"""How time and memory of choosing grow with the tokens of an image or video.

    python benchmarks/scale.py                        # every method, 1k to 131k tokens: an hour
    python benchmarks/scale.py --methods divprune     # these again; the file keeps the others
    python benchmarks/scale.py --show                 # the table (also `.txt`) of what was measured

Methods that read tokens and signals alone plan for one image (methods for videos: one video) of
random tokens, width 256, once to keep a quarter of them and once to keep 1,024: CPU time of one
thread, and the most bytes alive at once beyond what the method is handed (counted in a second run);
a probe through layers, which some ask for, is not counted.
A size is left out where those before it say that it would take more than `--limit-s`. Exponents are
between the last two sizes: N^1 is linear, N^2 compares all pairs. Trained networks, compositions,
merging in the encoder and what acts inside attention are left out.
"""

import argparse
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "kernels")]

import torch  # noqa: E402

from benchmarks.gpu.record import (  # noqa: E402
    Deadline,
    Part,
    Row,
    Settings,
    identity,
    measured,
    read_json,
)
from vispress import list_methods  # noqa: E402
from vispress.bench.timing.memory import peak_bytes  # noqa: E402
from vispress.config import make_compressor  # noqa: E402
from vispress.context import Context  # noqa: E402
from vispress.methods.base import Compressor, ScorePruner  # noqa: E402
from vispress.registry import get_method  # noqa: E402
from vispress.types import (  # noqa: E402
    Signal,
    Stage,
    Transition,
    TwoLayer,
    VisualTokens,
    full_index,
)

OUT = ROOT / "benchmarks" / "results" / "scale.json"
SIZES = (1024, 4096, 16384, 65536, 131072)
TINY = (128, 256)
COUNT = 1024
WIDTH, HEADS, WORDS = 256, 4, 16
CPU = torch.device("cpu")
SETTINGS: dict[str, dict[str, Any]] = {
    "layerwise": {"keep_ratio": 0.5},
    "lvlm_csp": {"keep_ratio": 0.5},
    "pyramiddrop": {},
    "sparsevlm": {},
    "sparsevlm_plus": {},
    "transprune": {},
    "visionzip": {"num_tokens": 64},
}
"""Settings other than `keep_ratio=0.25`, where a method takes no ratio or not that one."""
MOST_POWER, BRIEF_S = 3.0, 0.1
"""No method grows faster; what takes less time than that is timed thrice, and the least counts."""
ELSEWHERE = frozenset({"no_image", "vtw"})
"""Methods that drop all."""
COMPOSED = frozenset({"debias"})
"""Compositions that add work of their own to the method inside."""


class TooLongError(Exception):
    """A measurement was stopped."""


def subjects() -> list[str]:
    """Methods that plan from tokens and signals alone."""
    return [name for name in list_methods() if _reads_tokens(name)]


def _reads_tokens(name: str) -> bool:
    cls = get_method(name)
    composed = cls.evidence == "composition" and name not in COMPOSED
    if cls.trained or composed or cls.needs == "anyres" or name in ELSEWHERE:
        return False
    method = compressor(name)
    stages = {place.stage for place in method.placements(32)}
    return stages <= {Stage.PRE_LLM, Stage.IN_LLM} and method.encoder_merger() is None


def compressor(name: str) -> Compressor:
    """A method with a budget where it takes one; `plan` is handed counts."""
    own = {"keep_ratio": 0.25} if get_method(name).takes_budget else {}
    return make_compressor(name, **SETTINGS.get(name, own))


QUADRATIC = frozenset({"llava_scissor"})
"""Methods for videos that compare all pairs by definition: components of all that frames left."""


def judged(name: str) -> bool:
    """Whether a method scores tokens or is made for videos: both must stay near linear."""
    cls = get_method(name)
    return name not in QUADRATIC and (issubclass(cls, ScorePruner) or cls.needs == "video")


def tokens_for(method: Compressor, N: int) -> VisualTokens:
    """One image or video of N random tokens, with the signals of the method's first placement."""
    generator = torch.Generator().manual_seed(N)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def rows(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) / N

    def transition(layer: int) -> Transition:
        return Transition(
            layer=layer,
            magnitude=normal(1, 2, N),
            cosine=normal(1, 2, N),
            sequence_cosine=normal(1, 2, N + WORDS),
            sequence_valid=torch.ones(1, N + WORDS, dtype=torch.bool),
        )

    layers = len(method.encoder_layers(24, 22))
    many = () if layers == 1 else (layers,)
    first = method.placements(32)[0]
    asked = () if first.attention_depth == 1 else (first.attention_depth,)
    matrix, x = normal(WIDTH, WIDTH) / WIDTH**0.5, normal(1, N, WIDTH)
    made: dict[Signal, Callable[[], Any]] = {
        Signal.CLS_ATTENTION: lambda: rows(1, *many, HEADS, N),
        Signal.COLUMN_ATTENTION: lambda: rows(1, *many, HEADS, N),
        Signal.PATCH_ATTENTION: lambda: rows(1, *many, HEADS, N),
        Signal.CLS_LOGITS: lambda: normal(1, *many, HEADS, N),
        Signal.CLS_WIDE_ATTENTION: lambda: rows(1, *many, 1, N),
        Signal.VISION_KEYS: lambda: normal(1, HEADS, N, WIDTH // HEADS),
        Signal.VISION_FEATURES: lambda: normal(1, N, WIDTH),
        Signal.PROJECTOR: lambda: lambda v: torch.nn.functional.gelu(v @ matrix) @ matrix,
        Signal.TEXT_EMBEDDINGS: lambda: normal(1, WORDS, WIDTH),
        Signal.INPUT_EMBEDDINGS: lambda: x,
        Signal.IMAGE_COUNT: lambda: torch.ones(1, dtype=torch.int64),
        Signal.IMAGE_NUMBER: lambda: torch.zeros(1, dtype=torch.int64),
        Signal.CONTEXT: lambda: Context(paired_text=normal(1, WIDTH)),
        Signal.DEPTH: lambda: (first.layer, 32),
        Signal.PADDING: lambda: torch.zeros(1, N),
        Signal.TRANSITION: lambda: tuple(map(transition, first.transitions)),
    }
    if first.stage is Stage.IN_LLM or first.probe is not None:
        made |= {
            Signal.QUERY_ATTENTION: lambda: rows(1, *asked, HEADS, WORDS, N),
            Signal.MEAN_ATTENTION: lambda: rows(1, N),
            Signal.UPDATE_NORM: lambda: rows(1, N),
            Signal.KEY_NORMS: lambda: rows(1, N + WORDS),
            Signal.ROTARY_PRIOR: lambda: 1 + rows(1, WORDS, N),
            Signal.TEXT_STATES: lambda: normal(1, WORDS, WIDTH),
            Signal.FINAL_NORM: lambda: lambda v: v,
        }
    given = {kind.value: made[kind]() for kind in sorted(method.signals() & made.keys())}
    if Signal.PROJECTOR in method.signals():
        given["two_layer"] = TwoLayer(w1=matrix.T, b1=None, w2=matrix.T, b2=None)
    side = 1 << (N.bit_length() - 1) // 2
    grid = (N // 64, 8, 8) if method.needs == "video" else (1, side, N // side)
    index = full_index(1, N, CPU)
    return VisualTokens(
        features=x, index=index, num_original=N, grid=grid, text_after=WORDS, **given
    )


def measure(name: str, keep: str, sizes: Sequence[int], limit_s: float) -> Row:
    """Plans of one method for all sizes, to keep `"quarter"` or a count of tokens."""
    found: list[dict[str, Any]] = []
    stopped = None
    for N in sizes:
        K = N // 4 if keep == "quarter" else int(keep)
        if K >= N:
            continue
        if found and (expected := _expected(found, N)) > limit_s:
            stopped = f"{N} tokens would take about {expected:.0f} s"
            break
        method = compressor(name)
        tokens = tokens_for(method, N)
        # adaptive placements are asked with all tokens
        plan = partial(method.plan, tokens, N if method.placements(32)[0].adaptive else K)
        try:
            seconds = _within(plan, limit_s)
            if seconds < BRIEF_S:
                seconds = min(seconds, *(_within(plan, limit_s) for _ in range(2)))
            peak = peak_bytes(CPU, plan)
        except TooLongError:
            stopped = f"{N} tokens took more than {limit_s:g} s"
            break
        found.append({"tokens": N, "seconds": round(seconds, 4), "peak_bytes": peak})
    row: Row = {"method": name, "keep": keep, "judged": judged(name), "limit_s": limit_s}
    row["sizes"] = found
    for key, value in (("time_exponent", "seconds"), ("memory_exponent", "peak_bytes")):
        row[key] = None if len(found) < 2 else round(_exponent(found, value), 2)
    return row | {"stopped": stopped}


def _exponent(found: Sequence[dict[str, Any]], value: str) -> float:
    before, last = found[-2:]
    grown = max(last[value], 1e-9) / max(before[value], 1e-9)
    return math.log(grown) / math.log(last["tokens"] / before["tokens"])


def _expected(found: Sequence[dict[str, Any]], N: int) -> float:
    power = min(max(1.0, _exponent(found, "seconds")), MOST_POWER) if len(found) > 1 else 1.0
    return float(found[-1]["seconds"] * (N / found[-1]["tokens"]) ** power)


def _within(call: Callable[[], Any], limit_s: float) -> float:
    """CPU seconds of a call, stopped when they pass the limit."""

    def stop(*_: Any) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    try:
        start = time.process_time()
        call()
        return time.process_time() - start
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def table(rows: Sequence[Row]) -> str:
    """A line a method and budget: CPU seconds and MB by size, exponents of both."""
    lines = [f"{'method':16}{'keep':>8}" + "".join(f"{N:>17,}" for N in SIZES) + "   time memory"]
    for row in sorted(rows, key=lambda row: (row["name"].split("/")[1], row["name"])):
        if "error" in row:
            lines.append(f"{row['name']:24} {row['error'][:100]}")
            continue
        by_size = {size["tokens"]: size for size in row["sizes"]}
        cells = [
            f"{by_size[N]['seconds']:7.2f} s{by_size[N]['peak_bytes'] / 1e6:6.0f} MB"
            if N in by_size
            else "-"
            for N in SIZES
        ]
        powers = (row["time_exponent"], row["memory_exponent"])
        cells_text = "".join(f"{cell:>17}" for cell in cells)
        powers_text = "".join(f"{'-' if p is None else format(p, '.1f'):>7}" for p in powers)
        lines.append(f"{row['method']:16}{row['keep']:>8}{cells_text}{powers_text}")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the file, print the table; 1 where a method failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file")
    parser.add_argument("--methods", default="", help="names, with commas; all by default")
    parser.add_argument("--keep", default=f"{COUNT},quarter", help="counts or quarter, with commas")
    parser.add_argument("--limit-s", type=float, default=60.0, help="of one plan")
    parser.add_argument("--show", action="store_true", help="print what was measured")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    given = parser.parse_args(arguments)
    if given.dry_run and given.out == OUT:
        given.out = Path(tempfile.gettempdir()) / "vispress-scale-dry-run.json"
    known = (read_json(given.out) or {}).get("rows", [])
    if not given.show:
        torch.set_num_threads(1)
        names = [name for name in given.methods.split(",") if name] or subjects()
        settings = Settings(CPU, given.out.parent, given.dry_run, identity(CPU, given.dry_run))
        part = Part(given.out.stem, settings, Deadline(86_400.0))
        part.rows, part.extra = list(known), {"width": WIDTH}
        for keep in given.keep.split(","):
            for method in names:
                name, sizes = f"{method}/{keep}", TINY if given.dry_run else SIZES
                row = measured(name, partial(measure, method, keep, sizes, given.limit_s))
                part.rows = [other for other in part.rows if other["name"] != name]
                part.add(row)
                print(f"{name}: {row.get('error') or row['stopped'] or row['took_s']}", flush=True)
        part.finish()
        known = part.rows
    text = table(known)
    given.out.with_suffix(".txt").write_text(text)
    print(text, end="")
    return int(any("error" in row for row in known))


if __name__ == "__main__":
    sys.exit(main())
