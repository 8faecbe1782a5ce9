"""Greedy selections beside the loops of their papers' code, on a CPU.

    python benchmarks/greedy.py              # 576 and 2,880 tokens, about a minute
    python benchmarks/greedy.py --dry-run    # tiny

`divprune` and `cdpruner` state what the authors' code does as it reads, in plain torch: a matrix of
all distances, and in each step the rows of all tokens chosen so far; the kernel matrix and its
factor. A round times them and ours one after the other, in CPU time of one thread, which other
processes move less than the clock's; a ratio is taken within a round (above 1: ours is faster). The
loops must choose the same tokens: `same` is the share of places where they do.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "kernels")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.gpu.record import Deadline, Part, Settings, identity, quantiles  # noqa: E402
from vispress_kernels.dpp_select import dpp_select  # noqa: E402
from vispress_kernels.maxmin_select import maxmin_select  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "greedy.json"
SIZES = ((576, 64, 4096), (576, 192, 4096), (2880, 320, 4096))
"""Tokens, how many of them are kept, width: LLaVA-1.5 and LLaVA-NeXT."""
TINY = ((48, 9, 64),)


def divprune(x: Tensor, num_keep: int) -> Tensor:
    """Choose farthest tokens of one image `[N, D]`, in order, as DivPrune's code does.

    The first has the largest distance to its nearest other token; each next one has the largest
    least distance to those chosen.
    """
    unit = x / x.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    chosen = torch.empty(num_keep, dtype=torch.int64)
    for step in range(num_keep):
        if step == 0:
            nearest = torch.topk(distance, 2, dim=0, largest=False).values[1]
        else:
            nearest = distance.index_select(0, chosen[:step]).amin(dim=0)
        chosen[step] = nearest.argmax()
    return chosen


def cdpruner(x: Tensor, relevance: Tensor, num_keep: int) -> Tensor:
    """Choose tokens of images `[B, N, D]`, in order, as CDPruner's code does: greedy MAP of a DPP.

    The kernel matrix is whole; each step has one more row of its factor.
    """
    unit = x / x.norm(dim=-1, keepdim=True)
    kernel = relevance[:, :, None] * (unit @ unit.mT) * relevance[:, None]
    B, N, _ = x.shape
    images = torch.arange(B)
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    factor = torch.zeros(num_keep, B, N)
    chosen = torch.empty(num_keep, B, dtype=torch.int64)
    for step in range(num_keep):
        best = gain.argmax(dim=1)
        chosen[step] = best
        known = torch.einsum("sb,sbn->bn", factor[:step, images, best], factor[:step])
        row = (kernel[images, best] - known) / gain[images, best].sqrt()[:, None]
        factor[step] = row
        gain -= row.square()
        gain[images, best] = -torch.inf
    return chosen.T


def cases(N: int, num_keep: int, D: int) -> dict[str, tuple[Callable[[], Tensor], ...]]:
    """Their loop and ours for each method, on one image of drawn tokens."""
    generator = torch.Generator().manual_seed(N + num_keep)
    x = torch.randn(1, N, D, generator=generator)
    relevance = torch.rand(1, N, generator=generator) + 0.1
    return {
        "divprune": (lambda: divprune(x[0], num_keep)[None], lambda: maxmin_select(x, num_keep)),
        "cdpruner": (
            lambda: cdpruner(x, relevance, num_keep),
            lambda: dpp_select(x, relevance, num_keep),
        ),
    }


def compare(theirs: Callable[[], Tensor], ours: Callable[[], Tensor], rounds: int) -> Any:
    """Time both in turn; the first round, which warms up, does not count."""
    same = float((theirs() == ours()).float().mean())
    times = [(_milliseconds(theirs), _milliseconds(ours)) for _ in range(rounds)]
    authors, own = (list(values) for values in zip(*times, strict=True))
    return {
        "same": same,
        "authors_ms": quantiles(authors),
        "ours_ms": quantiles(own),
        "ratio": quantiles([a / b for a, b in times]),
    }


def _milliseconds(call: Callable[[], Tensor]) -> float:
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the file, print a table; 1 where ours is slower or chooses other tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dry-run", action="store_true", help="tiny, one round")
    given = parser.parse_args(arguments)
    if given.dry_run and given.out == OUT:
        given.out = Path(tempfile.gettempdir()) / "vispress-greedy-dry-run.json"
    torch.set_num_threads(1)
    device = torch.device("cpu")
    tied = identity(device, given.dry_run) | {"threads": 1}
    settings = Settings(device, given.out.parent, given.dry_run, tied, force=True)
    part = Part(given.out.stem, settings, Deadline(3600.0))
    for N, num_keep, D in TINY if given.dry_run else SIZES:
        for method, (theirs, ours) in cases(N, num_keep, D).items():
            shape = {"method": method, "tokens": N, "keep": num_keep, "width": D}
            rounds = 1 if given.dry_run else given.rounds
            name = f"{method}/{N}/{num_keep}"
            row = part.row(name, lambda: shape | compare(theirs, ours, rounds))  # noqa: B023
            if row is not None and "error" not in row:
                times = row["authors_ms"]["median"], row["ours_ms"]["median"]
                print(
                    f"{name:20} {row['ratio']['median']:5.2f}  theirs {times[0]:8.1f} ms"
                    f"  ours {times[1]:8.1f} ms  same {row['same']:.3f}",
                    flush=True,
                )
    part.finish()
    fine = ["ratio" in row and row["ratio"]["median"] >= 1 for row in part.rows]
    return int(not all(fine) and not given.dry_run)


if __name__ == "__main__":
    sys.exit(main())
