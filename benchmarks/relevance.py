"""Ask the reference model training-split questions under relevance_dpp at some weights, and others.

    vispress train-compressor --out learned
    python benchmarks/relevance.py learned

Weight and `spread` are chosen on these questions; no table of the benchmark is made of them.
Printed are shares of right answers in percent, by tokens of 144.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

SEED = 99
"""Questions are about other scenes than those that are trained on by default."""


def share_right(loaded: Any, prompts: Sequence[Any]) -> float:
    """Answer prompts with one picture each, and give the share of right answers in percent."""
    from vispress.reference.evaluation.evaluate import generate_words

    texts, images = [p.text for p in prompts], [p.images[0] for p in prompts]
    words = generate_words(loaded.model, loaded.processor, texts, batch=32, images=images)
    return 100 * sum(w == p.answer for w, p in zip(words, prompts, strict=True)) / len(prompts)


def main(words: Sequence[str] | None = None) -> None:
    """Print a line for each method and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what vispress train-compressor wrote")
    parser.add_argument("--questions", type=int, default=360)
    parser.add_argument("--model", default="reference", help="what the folder was trained for")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 16, 32, 72])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.05, 0.1, 0.125, 0.25])
    args = parser.parse_args(words)
    from vispress import compress_model, remove_compression, update_compression
    from vispress.bench.model.loaded_model import load_named_model
    from vispress.distillation.scenes import training_prompts
    from vispress.methods import CDPruner, DivPrune

    loaded = load_named_model(args.model, "cpu", "fp32")
    prompts = list(training_prompts(args.questions, SEED))
    for count in args.tokens:
        for method in (DivPrune(num_tokens=count), CDPruner(num_tokens=count)):
            compress_model(loaded.model, method)
            print(f"{count:4} {method.name:14} {share_right(loaded, prompts):5.1f}", flush=True)
            remove_compression(loaded.model)
        compress_model(loaded.model, config=args.folder)
        for weight, spread in product(args.weights, (0.0, 1.0)):
            update_compression(loaded.model, num_tokens=count, weight=weight, spread=spread)
            found = share_right(loaded, prompts)
            kind = "DPP" if spread else "max-min"
            print(
                f"{count:4} {'relevance_dpp':14} {found:5.1f}  weight {weight} {kind}", flush=True
            )
        remove_compression(loaded.model)


if __name__ == "__main__":
    main()
