"""The README's table of what compression saves on a GPU, from the committed results.

python -m benchmarks.speed_table
"""

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "gpu-nvidia-h200" / "models.json"
METHODS = {"fastv": "FastV", "divprune": "DivPrune"}
MODELS = {
    "llava_1_5_7b": "LLaVA-1.5-7B",
    "llava_next_7b": "LLaVA-NeXT-7B",
    "qwen2_5_vl_7b": "Qwen2.5-VL-7B",
}
HEAD = ("model", "batch", "method", "visual tokens", "prefill, ms", "times", "first token, times")


def speed_markdown(rows: list[dict[str, Any]] | None = None) -> str:
    """Give a row for each model, batch and method, in the order of the models.

    Args:
        rows: Of the GPU suite's part `models`; the committed ones by default.
    """
    found = json.loads(RESULTS.read_text())["rows"] if rows is None else rows
    known = {(row.get("model"), row.get("batch"), row.get("method")): row for row in found}
    table = [HEAD, ("---",) * len(HEAD)]
    for model, name in MODELS.items():
        for batch in sorted({key[1] for key in known if key[0] == model}):
            for method, title in METHODS.items():
                row = known.get((model, batch, method), {})
                if "prefill_speedup" in row:
                    table.append((name, str(batch), title, *_numbers(row)))
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def _numbers(row: dict[str, Any]) -> tuple[str, ...]:
    before, after = (row["prefill_ms"][key]["median"] for key in ("uncompressed", "compressed"))
    return (
        f"{row['visual_tokens']:,} to {row['kept_at_last_layer']:,}",
        f"{before:.0f} to {after:.0f}",
        f"{row['prefill_speedup']:.2f}",
        f"{row['ttft_speedup']:.2f}",
    )


if __name__ == "__main__":
    sys.stdout.write(speed_markdown() + "\n")
