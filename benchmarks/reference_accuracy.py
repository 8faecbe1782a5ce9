"""Exact match of a shipped reference model at full tokens, on held-out questions of each kind.

    python benchmarks/reference_accuracy.py [--architecture qwen2_5_vl [--clips]] [--questions 1000]
        [--episodes 1000] [--out FILE]

Minutes on two cores. Writes `benchmarks/results/reference/accuracy.json` (of the Qwen2.5-VL:
`benchmarks/results/reference_qwen2_5_vl/accuracy.json`, with `--clips` beside it) unless told
otherwise.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from vispress.reference import load
from vispress.reference.evaluation.clip_sets import clip_accuracy
from vispress.reference.evaluation.conversation import episode_accuracy
from vispress.reference.evaluation.evaluate import accuracy

RESULTS = Path(__file__).parent / "results"
FOLDERS = {"llava": "reference", "qwen2_5_vl": "reference_qwen2_5_vl"}


def main() -> None:
    """Ask, count, write."""
    parser = argparse.ArgumentParser(description="Accuracy of the reference model at full tokens")
    parser.add_argument("--questions", type=int, default=1000, help="questions a kind")
    parser.add_argument("--episodes", type=int, default=1000, help="episodes a kind")
    parser.add_argument("--architecture", choices=[*FOLDERS], default="llava")
    parser.add_argument("--clips", action="store_true", help="the one that was trained on videos")
    parser.add_argument("--out", type=Path, help="result file")
    options = parser.parse_args()
    folder = FOLDERS[options.architecture] + ("_clips" if options.clips else "")
    out = options.out or RESULTS / folder / "accuracy.json"
    model, processor = load(architecture=options.architecture, clips=options.clips)
    scores: dict[str, float] = dict(accuracy(model, processor, n=options.questions))
    result: dict[str, Any] = {"questions": options.questions, "accuracy": scores}
    if options.clips:
        scores |= clip_accuracy(model, processor, n=options.questions)
    elif options.architecture == "llava":
        result["episodes"] = options.episodes
        scores |= episode_accuracy(model, processor, n=options.episodes)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
