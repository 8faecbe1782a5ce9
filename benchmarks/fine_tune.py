"""Fine-tune the reference model with a method that works in its layers, and ask held-out questions.

    python benchmarks/fine_tune.py pmod --out trained/pmod
    python benchmarks/fine_tune.py fastv --option layer=1 --option keep_ratio=0.5 --out fastv
    python benchmarks/fine_tune.py voco --gists 16 --rank 16 --lr 2e-3 --out voco

LoRA (language model, and attention of the encoder) and the method's own parameters learn from
answers of training scenes, in a hand-written loop; the rest is frozen, but for the embedding of a
new word: `--gists` puts so many VoCo tokens behind each picture. Written are the compressor's
folder, the adapter, the curve and, by task, which held-out questions came out right: untouched,
compressed and untrained, trained. About 20 minutes on one core for 400 steps; an interrupted run
goes on from its last 50 steps.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 32
MODULES_LR = 2e-2
SAVE_EVERY = 50
GIST = "<voco>"
TARGETS = re.compile(r"layers\.\d+\.(self_attn|mlp)\.\w+_proj$")


def learn(loaded: Any, model: nn.Module, args: argparse.Namespace) -> list[float]:
    """Train what is trainable on answers; give the loss of each step.

    Args:
        loaded: The model's processor.
        model: The compressed model with its adapter.
        args: Of the command.
    """
    from vispress import compression_loss, parameter_groups
    from vispress.training import set_progress

    steps, folder = args.steps, args.out
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=args.lr, modules_lr=MODULES_LR))
    rates = [group["lr"] for group in optimizer.param_groups]
    learned = [p for p in model.parameters() if p.requires_grad]
    losses = resume(folder, learned, optimizer)
    model.train()
    for step, batch in enumerate(batches(loaded, steps, args.seed, args.gists)):
        if step < len(losses):
            continue
        set_progress(model, step / steps)
        falling = min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * falling
        with compression_loss(model) as extra:
            loss = model(**batch, use_cache=False).loss + extra()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        losses.append(round(float(loss.detach()), 5))
        if len(losses) % SAVE_EVERY == 0:
            keep_state(folder, learned, optimizer, losses)
            print(f"{len(losses):5} {sum(losses[-SAVE_EVERY:]) / SAVE_EVERY:.4f}", flush=True)
    model.eval()
    return losses


def with_gists(text: str, gists: int) -> str:
    """Put VoCo tokens behind the picture of a prompt."""
    from vispress.reference.world.words import IMAGE

    return text.replace(IMAGE, " ".join([IMAGE, *[GIST] * gists]))


def batches(loaded: Any, steps: int, seed: int, gists: int) -> Iterator[dict[str, Tensor]]:
    """Draw batches of prompts with their answers; labels are the answer and what ends it."""
    from vispress.distillation.own_answers import with_answers
    from vispress.distillation.scenes import training_prompts

    drawn = training_prompts(steps * BATCH, seed)
    prompts = [replace(one, text=with_gists(one.text, gists)) for one in drawn]
    for start in range(0, len(prompts), BATCH):
        yield with_answers(loaded, prompts[start : start + BATCH])


def keep_state(
    folder: Path, learned: Sequence[Tensor], optimizer: Any, losses: list[float]
) -> None:
    """Write what a resume needs."""
    from safetensors.torch import save_file

    tensors = {f"parameter.{n}": p.detach().clone() for n, p in enumerate(learned)}
    for number, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in entry.items()}
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "state.tmp"
    save_file(tensors, unfinished, {"losses": json.dumps(losses)})
    unfinished.replace(folder / "state.safetensors")


def resume(folder: Path, learned: Sequence[Tensor], optimizer: Any) -> list[float]:
    """Read it, where there is any."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    file = folder / "state.safetensors"
    if not file.exists():
        return []
    tensors = load_file(file)
    with torch.no_grad():
        for number, parameter in enumerate(learned):
            parameter.copy_(tensors[f"parameter.{number}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, place, *rest = name.split(".")
        if kind == "optimizer":
            state.setdefault(int(place), {})[rest[0]] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    with safe_open(file, "pt") as opened:
        losses: list[float] = json.loads(opened.metadata()["losses"])
    return losses


def right(loaded: Any, model: nn.Module, questions: int, gists: int = 0) -> dict[str, list[int]]:
    """Ask held-out questions of each kind of single picture; 1 for a right answer, else 0."""
    from vispress.reference.evaluation.evaluate import generate_words, held_out
    from vispress.reference.world.words import KINDS

    found: dict[str, list[int]] = {}
    for kind in KINDS:
        examples = held_out(kind, questions)
        texts = [with_gists(e.question.prompt, gists) for e in examples]
        images = [e.image for e in examples]
        answers = generate_words(model, loaded.processor, texts, batch=64, images=images)
        told = zip(answers, examples, strict=True)
        found[kind] = [int(answer == e.question.answer) for answer, e in told]
    shares = {kind: round(100 * sum(row) / len(row), 1) for kind, row in found.items()}
    print(f"mean {sum(shares.values()) / len(shares):.1f}  {shares}", flush=True)
    return found


def adapt(loaded: Any, rank: int, gists: int) -> Any:
    """Put LoRA on LLM and encoder; with VoCo tokens, a row of the embedding is trained, too."""
    from peft import LoraConfig, get_peft_model

    model = loaded.model
    names = [name for name, _ in model.named_modules() if TARGETS.search(name)]
    rows: dict[str, list[int]] | None = None
    if gists:
        loaded.processor.tokenizer.add_tokens(GIST, special_tokens=True)
        # the last word is the one that VoCo takes for its own
        model.resize_token_embeddings(len(loaded.processor.tokenizer))
        rows = {"embed_tokens": [len(loaded.processor.tokenizer) - 1]}
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=names, trainable_token_indices=rows
    )
    return get_peft_model(model, config)


def main(words: Sequence[str] | None = None) -> None:
    """Fine-tune, ask, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", help="a method's name")
    parser.add_argument("--option", action="append", default=[], help="FIELD=VALUE of the method")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--questions", type=int, default=200, help="held-out ones a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3, help="of LoRA")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA")
    parser.add_argument("--gists", type=int, default=0, help="VoCo tokens behind each picture")
    args = parser.parse_args(words)
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    from vispress import compress_model, save_compression
    from vispress.bench.model.loaded_model import load_named_model
    from vispress.method_options import make_all, parse_options

    torch.manual_seed(args.seed)
    loaded = load_named_model("reference", "cpu", "fp32")
    found = {"untouched": right(loaded, loaded.model, args.questions)}
    adapted = adapt(loaded, args.rank, args.gists)
    (made,) = make_all([args.method], parse_options(args.option))
    compress_model(adapted, made)
    found["untrained"] = right(loaded, adapted, args.questions, args.gists)
    start = time.process_time()
    losses = learn(loaded, adapted, args)
    seconds = time.process_time() - start
    found["trained"] = right(loaded, adapted, args.questions, args.gists)
    args.out.mkdir(parents=True, exist_ok=True)
    told = {"steps": args.steps, "batch": BATCH, "lr": args.lr, "modules_lr": MODULES_LR}
    told |= {"seed": args.seed, "lora": args.rank}
    told |= {"gists": args.gists} if args.gists else {}
    save_compression(adapted, args.out / "compressor", data=told)
    adapter = {k: v.half().contiguous() for k, v in get_peft_model_state_dict(adapted).items()}
    save_file(adapter, args.out / "adapter.safetensors")
    result = {"method": args.method, "options": args.option, **told, "cpu_seconds": round(seconds)}
    text = json.dumps(result | {"loss": losses, "right": found})
    (args.out / "result.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
