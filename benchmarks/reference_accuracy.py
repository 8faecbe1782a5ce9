"""Exact match of the shipped reference model at full tokens, on held-out questions of each kind.

    python benchmarks/reference_accuracy.py [--questions 1000] [--episodes 1000] [--out FILE]

Minutes on two cores. Writes `benchmarks/results/reference/accuracy.json` unless told otherwise.
"""

import argparse
import json
from pathlib import Path

from vispress.reference import load
from vispress.reference.conversation import episode_accuracy
from vispress.reference.evaluate import accuracy

DEFAULT = Path(__file__).parent / "results" / "reference" / "accuracy.json"


def main() -> None:
    """Ask, count, write."""
    parser = argparse.ArgumentParser(description="Accuracy of the reference model at full tokens")
    parser.add_argument("--questions", type=int, default=1000, help="questions a kind")
    parser.add_argument("--episodes", type=int, default=1000, help="episodes a kind")
    parser.add_argument("--out", type=Path, default=DEFAULT)
    options = parser.parse_args()
    model, processor = load()
    result = {
        "questions": options.questions,
        "episodes": options.episodes,
        "accuracy": accuracy(model, processor, n=options.questions)
        | episode_accuracy(model, processor, n=options.episodes),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
