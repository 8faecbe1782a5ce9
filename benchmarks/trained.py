"""Ask the reference model training-split questions under compressors that were trained for it.

    vispress train-compressor --method covipal --set layers=[1] --set num_tokens=16 --out attended
    vispress train-compressor --method covipal --set layers=[1] --set num_tokens=16 \\
        --stage answers --start-from attended --batch-size 24 --out answered
    python -m benchmarks.trained attended answered --fresh covipal layers=[1] num_tokens=16

Printed are shares of right answers in percent. No table is made of these questions.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.relevance import SEED, share_right


def main(words: Sequence[str] | None = None) -> None:
    """Print a line for each folder, and one for the method with the parameters it begins with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders", type=Path, nargs="*", help="what vispress train-compressor wrote"
    )
    parser.add_argument("--questions", type=int, default=180)
    parser.add_argument("--fresh", nargs="+", action="append", default=[], metavar="WORD",
                        help="a method's name, then KEY=VALUE: as it is, or untrained")  # fmt: skip
    args = parser.parse_args(words)
    from vispress import compress_model, remove_compression
    from vispress.bench.model.loaded_model import load_named_model
    from vispress.distillation.scenes import training_prompts
    from vispress.method_options import make_all, parse_options

    loaded = load_named_model("reference", "cpu", "fp32")
    prompts = list(training_prompts(args.questions, SEED))
    for name, *pairs in args.fresh:
        (method,) = make_all([name], parse_options(pairs))
        compress_model(loaded.model, method)
        print(f"{share_right(loaded, prompts):5.1f}  {name} {' '.join(pairs)}", flush=True)
        remove_compression(loaded.model)
    for folder in args.folders:
        compress_model(loaded.model, config=folder)
        print(f"{share_right(loaded, prompts):5.1f}  {folder}", flush=True)
        remove_compression(loaded.model)


if __name__ == "__main__":
    main()
