"""Time training steps under compression against the uncompressed model, padded and packed.

    python benchmarks/training_cost.py [--steps 12] [--out FILE]

A random LLaVA of 12 layers and 576 visual tokens an image, forward and backward of every parameter,
with four documents of different lengths: as a left-padded batch, and as one packed row (position
ids that start again). Ways take turns step by step, so that whatever else the machine does meets
them all; printed and written are medians, and the peak of memory of one step beyond weights and
inputs. Ten minutes on one core.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LAYERS, WIDTH, VISUAL = 12, 256, 576
WORDS = (24, 64, 112, 200)
WAYS: dict[str, Mapping[str, Any]] = {
    "none": {},
    "fastv": {"method": "fastv", "layer": 2, "mean_keep_ratio": 0.5},
    "pmod": {"method": "pmod", "mean_keep_ratio": 0.5},
    "divprune": {"method": "divprune", "keep_ratio": 0.5},
}
OUT = Path(__file__).parent / "results" / "training_cost.json"


def make_model() -> nn.Module:
    """Build a LLaVA with random weights: a small vision tower, a narrow and deep decoder."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    text = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=688, num_hidden_layers=LAYERS, vocab_size=512,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=4096,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        image_size=336, patch_size=14,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=511)
    model: nn.Module = LlavaForConditionalGeneration(config)
    return model.train()


def make_batches() -> dict[str, dict[str, Tensor]]:
    """Make the same four documents as a padded batch and as one packed row."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = [], []
    for words in WORDS:
        text = torch.randint(5, 500, (words,), generator=generator)
        question, answer = text[: words // 2], text[words // 2 :]
        ids.append(torch.cat([torch.full((VISUAL,), 511), question, answer]))
        labels.append(torch.cat([torch.full((VISUAL + len(question),), -100), answer]))
    pixels = torch.randn(len(WORDS), 3, 336, 336, generator=generator)
    longest = max(map(len, ids))

    def padded(parts: Sequence[Tensor], value: int) -> Tensor:
        fill = [part.new_full((longest - len(part),), value) for part in parts]
        return torch.stack([torch.cat(both) for both in zip(fill, parts, strict=True)])

    mask = padded([torch.ones_like(part) for part in ids], 0)
    rows = {"input_ids": padded(ids, 0), "labels": padded(labels, -100), "attention_mask": mask}
    line = {
        "input_ids": torch.cat(ids)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(len(part)) for part in ids])[None],
    }
    return {"padded": rows | {"pixel_values": pixels}, "packed": line | {"pixel_values": pixels}}


def step(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Run forward and backward."""
    model.zero_grad(set_to_none=True)
    model(**batch, use_cache=False).loss.backward()


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(words)
    from vispress import compress_model
    from vispress.bench.timing.memory import peak_bytes

    torch.set_num_threads(1)
    batches = make_batches()
    models = {way: make_model() for way in WAYS}
    for way, options in WAYS.items():
        if options:
            compress_model(models[way], **options)
    result: dict[str, Any] = {"layers": LAYERS, "width": WIDTH, "visual": VISUAL, "words": WORDS}
    for layout, batch in batches.items():
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(args.steps + 1):
            for way, model in models.items():
                start = time.perf_counter()
                step(model, batch)
                if number:  # the first one warms up
                    seconds[way].append(time.perf_counter() - start)
        for way, model in models.items():
            step(model, batch)  # gradients exist: they are no part of the peak
            peak = peak_bytes(torch.device("cpu"), partial(step, model, batch))
            took = statistics.median(seconds[way])
            row = {"steps_per_second": round(1 / took, 3), "peak_mb": round(peak / 1e6, 1)}
            row["time_ratio"] = round(took / statistics.median(seconds["none"]), 3)
            result[f"{layout} {way}"] = row
            print(f"{layout:7} {way:9} {row}", flush=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
