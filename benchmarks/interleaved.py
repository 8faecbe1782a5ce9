"""Time prefills of two checkouts of vispress in turn, each in a process of its own.

    python benchmarks/interleaved.py ../other-checkout --rounds 200
    python benchmarks/interleaved.py ../other-checkout --methods fastv,divprune

A random LLaVA of 32 narrow layers, where Python is the price. A round times one prefill of this
checkout and one of the other, one after the other while nothing else of ours runs; what is printed
is the median of the ratios within a round (below 1: this checkout is faster), for the model as it
is, too, which is the noise.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
METHODS = "fastv,divprune,visionzip,pyramiddrop,transprune"
PLAIN = "none"


def serve() -> None:
    """Answer lines with a method's name by the milliseconds of one prefill."""
    import torch
    from tests.tiny import Image, Sample, Text, build, make_inputs

    from vispress import compress_model, remove_compression

    torch.set_num_threads(1)
    model = build("llava", dtype=torch.float32, layers=32)
    inputs = make_inputs("llava", [Sample([Text(20), Image(), Text(20)])], dtype=torch.float32)
    for line in sys.stdin:
        method = line.strip()
        if method != PLAIN:
            own = {} if method in ("pyramiddrop", "transprune") else {"keep_ratio": 0.25}
            compress_model(model, method, **own)
        with torch.no_grad():
            model(**inputs)
            start = time.perf_counter()
            model(**inputs)
            took = time.perf_counter() - start
        if method != PLAIN:
            remove_compression(model)
        sys.stdout.write(f"{1e3 * took}\n")
        sys.stdout.flush()


class Checkout:
    """A process that runs one checkout's code on this checkout's tiny model."""

    def __init__(self, root: Path) -> None:
        paths = [root / "src", root / "kernels", root]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--serve"],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
        )  # fmt: skip

    def time(self, method: str) -> float:
        """Milliseconds of a prefill.

        Raises:
            RuntimeError: The process has ended; its traceback stands above.
        """
        into: IO[str] | Any = self.process.stdin
        out: IO[str] | Any = self.process.stdout
        into.write(f"{method}\n")
        into.flush()
        if not (answer := out.readline()):
            raise RuntimeError(f"{method}: no answer")
        return float(answer)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a method: the median ratio, and both medians in milliseconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("other", type=Path, nargs="?", help="another checkout")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.serve:
        serve()
        return 0
    if given.other is None or not (given.other / "src").is_dir():
        parser.error(f"OTHER must be a checkout with a folder src, got {given.other}")
    here, other = Checkout(ROOT), Checkout(given.other.resolve())
    for method in [PLAIN, *given.methods.split(",")]:
        pairs = [(here.time(method), other.time(method)) for _ in range(given.rounds)]
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        mine, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(
            f"{method:12} {ratio:.3f} of the other's ({mine:.2f} ms, {theirs:.2f} ms)", flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
