"""Distil pictures of the reference model into VoCo tokens, and ask held-out questions.

    python -m benchmarks.distil_voco --out voco

A picture goes through the model once, with its VoCo tokens behind it; many questions about it go on
from what is left in the cache. Learned is the language model in full, as the authors do, by the
answers and by what the uncompressed model makes of the picture itself: the divergence of its
answers, and the distance of its hidden states on the words of questions, which is ours.
An interrupted run goes on from its last state. Written are the curve, which held-out questions came
out right (untouched, trained, and as kept), and what is kept of the trained model: of what changed
in each projection the largest singular values, and all other parameters, in half precision.
`learned_model` brings it back.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.fine_tune import GIST, keep_state, resume, right, with_gists

SEED_SCENES = 6 << 32
SAVE_EVERY = 25


@dataclass(frozen=True, eq=False)
class Lot:
    """Pictures and equally many questions about each.

    Args:
        images: P pictures.
        ids: `[P * K, T]`, questions with their answers, a picture's side by side; padding behind.
        labels: The same on answers and what ends them, -100 elsewhere.
    """

    images: list[Image.Image]
    ids: Tensor
    labels: Tensor


def lots(tokenizer: Any, args: argparse.Namespace) -> Iterator[Lot]:
    """Draw pictures of the training split and questions of all kinds, without end."""
    from vispress.reference.world.questions import mixture
    from vispress.reference.world.scenes import draw_scene
    from vispress.reference.world.words import KINDS

    quota = dict.fromkeys(KINDS, 1 + args.questions // len(KINDS))
    index = 0
    while True:
        images, rows = [], []
        while len(images) < args.pictures:
            scene = draw_scene(SEED_SCENES + args.seed, "train", index)
            rng = np.random.default_rng((args.seed, 8, index))
            index += 1
            asked = mixture(scene, rng, quota)
            if not asked:
                continue
            images.append(Image.fromarray(scene.pixels))
            asked = (asked * args.questions)[: args.questions]
            for one in asked:
                question, answer = (
                    tokenizer(text, add_special_tokens=False)["input_ids"]
                    for text in (one.text, one.answer)
                )
                rows.append((question, [*answer, tokenizer.eos_token_id]))
        longest = max(len(q) + len(a) for q, a in rows)
        ids = torch.full((len(rows), longest), tokenizer.eos_token_id)
        labels = torch.full_like(ids, -100)
        for row, (q, a) in enumerate(rows):
            ids[row, : len(q) + len(a)] = torch.tensor([*q, *a])
            labels[row, len(q) : len(q) + len(a)] = torch.tensor(a)
        yield Lot(images, ids, labels)


def ask(processor: Any, model: nn.Module, lot: Lot, gists: int) -> Any:
    """Show pictures once and ask all questions about them: an output of `[P * K, T]` rows."""
    from transformers import DynamicCache

    from vispress.reference.world.words import IMAGE
    from vispress.runtime.kv_cache.hf_compat import CACHE

    text = with_gists(IMAGE, gists)
    inputs = processor(images=lot.images, text=[text] * len(lot.images), return_tensors="pt")
    cache = DynamicCache()
    model(**inputs, use_cache=True, **{CACHE: cache})
    each = len(lot.ids) // len(lot.images)
    cache.batch_repeat_interleave(each)
    held = inputs["attention_mask"].repeat_interleave(each, 0)
    mask = torch.cat([held, torch.ones_like(lot.ids)], dim=1)
    return model(
        input_ids=lot.ids, attention_mask=mask, output_hidden_states=True, **{CACHE: cache}
    )


def hidden_distance(lot: Lot, own: Any, theirs: Any, end: int) -> Tensor:
    """Mean over layers of the squared distance of hidden states, over the teacher's variance.

    Padding, which repeats what ends an answer, does not count.
    """
    real = torch.cat([lot.ids[:, :1] != end, lot.ids[:, :-1] != end], dim=1)
    parts = []
    for mine, other in zip(own.hidden_states[1:], theirs.hidden_states[1:], strict=True):
        target = other[real]
        parts.append((mine[real] - target).square().mean() / target.var(dim=0).mean())
    return torch.stack(parts).mean()


def learn(loaded: Any, teacher: nn.Module, args: argparse.Namespace) -> list[Any]:
    """Train; give the answers' loss, their divergence and the hidden states' distance, by step."""
    from vispress.training import answer_divergence

    model, tokenizer = loaded.model, loaded.processor.tokenizer
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    curve: list[Any] = resume(args.out, learned, optimizer)
    model.train()
    for step, lot in enumerate(lots(tokenizer, args)):
        if step == args.steps:
            break
        if step < len(curve):
            continue
        falling = (1 + math.cos(math.pi * step / args.steps)) / 2
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / 20) * falling
        with torch.no_grad():
            told = ask(loaded.processor, teacher, lot, 0)
        own = ask(loaded.processor, model, lot, args.gists)
        where = lot.labels[:, 1:] != -100
        answers = nn.functional.cross_entropy(own.logits[:, :-1][where], lot.labels[:, 1:][where])
        apart = answer_divergence(own.logits, lot.labels, told.logits)
        far = hidden_distance(lot, own, told, tokenizer.eos_token_id)
        optimizer.zero_grad()
        (answers + args.divergence * apart + args.hidden * far).backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        curve.append([round(float(one.detach()), 4) for one in (answers, apart, far)])
        if len(curve) % SAVE_EVERY == 0:
            keep_state(args.out, learned, optimizer, curve)
        if len(curve) % 10 == 0:
            last = np.mean(curve[-10:], axis=0).round(4)
            print(f"{len(curve):5} {last} cpu {time.process_time():.0f}", flush=True)
    keep_state(args.out, learned, optimizer, curve)
    model.eval()
    return curve


def low_rank(model: nn.Module, before: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Give what is kept of trained parameters, in half precision.

    Args:
        model: Trained.
        before: Parameters that it began with, by name: those that were trained.
        rank: Singular values of what changed in each projection.
    """
    kept = {}
    for name, now in model.named_parameters():
        if name not in before:
            continue
        if "_proj." in name:
            left, size, right = torch.linalg.svd(now.detach() - before[name], full_matrices=False)
            kept[f"{name}.left"] = left[:, :rank] * size[:rank]
            kept[f"{name}.right"] = right[:rank]
        else:
            kept[name] = now.detach()
    return {name: value.half().contiguous() for name, value in kept.items()}


def with_word() -> tuple[Any, dict[str, Tensor]]:
    """Load the reference model with a VoCo token; and the parameters of its language model."""
    from vispress.bench.model.loaded_model import load_named_model

    loaded = load_named_model("reference", "cpu", "fp32")
    model, tokenizer = loaded.model, loaded.processor.tokenizer
    tokenizer.add_tokens(GIST, special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))  # the last word is the one that VoCo takes
    model.requires_grad_(False)
    model.model.language_model.requires_grad_(True)
    return loaded, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def learned_model(file: Path) -> Any:
    """Load the reference model as it was trained, compressed by `voco`."""
    from safetensors.torch import load_file

    from vispress import compress_model

    loaded, before = with_word()
    kept, parameters = load_file(file), dict(loaded.model.named_parameters())
    with torch.no_grad():
        for name, value in before.items():
            if name in kept:
                parameters[name].copy_(kept[name])
            else:
                change = kept[f"{name}.left"].float() @ kept[f"{name}.right"].float()
                parameters[name].copy_(value + change)
    compress_model(loaded.model, "voco")
    return loaded


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pictures", type=int, default=16, help="of a step")
    parser.add_argument("--questions", type=int, default=12, help="about each picture")
    parser.add_argument("--gists", type=int, default=16, help="VoCo tokens behind each picture")
    parser.add_argument("--divergence", type=float, default=1.0, help="weight of the answers'")
    parser.add_argument("--hidden", type=float, default=1.0, help="weight of hidden states")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=20, help="of what is kept of a projection")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--asked", type=int, default=200, help="held-out questions a task")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Distil, ask, write."""
    args = parse(words)
    from safetensors.torch import save_file

    from vispress import compress_model
    from vispress.bench.model.loaded_model import load_named_model

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    teacher = load_named_model("reference", "cpu", "fp32")
    found = {"untouched": right(teacher, teacher.model, args.asked)}
    loaded, before = with_word()
    compress_model(loaded.model, "voco")
    start = time.process_time()
    curve = learn(loaded, teacher.model.requires_grad_(False), args)
    seconds = round(time.process_time() - start)
    found["trained"] = right(loaded, loaded.model, args.asked, args.gists)
    save_file(low_rank(loaded.model, before, args.rank), args.out / "learned.safetensors")
    again = learned_model(args.out / "learned.safetensors")
    found[f"rank {args.rank}"] = right(again, again.model, args.asked, args.gists)
    told = {name: value for name, value in vars(args).items() if name not in ("out", "asked")}
    result = {"method": "voco distilled", **told, "cpu_seconds": seconds}
    text = json.dumps(result | {"curve": curve, "right": found})
    (args.out / "result.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
