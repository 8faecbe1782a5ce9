"""Model card and training curves, written from the logs and the evaluation."""

import json
import os
import platform
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from vispress.reference.train.qwen_card import QWEN_TEXT
from vispress.reference.world.clips import CLIP_CHANCE
from vispress.reference.world.episodes import EPISODE_CHANCE
from vispress.reference.world.questions import CHANCE

_TARGET: Final[dict[str, float]] = {
    "attribute": 0.95,
    "place": 0.95,
    "existence": 0.95,
    "needle": 0.90,
    "digit": 0.90,
    "reading": 0.90,
    "where": 0.90,
    "relation": 0.90,
    "count": 0.80,
    "compare": 0.80,
    "in_context": 0.80,
    "multi_turn": 0.80,
    "order": 0.80,
    "change": 0.80,
    "clip_order": 0.80,
    "clip_change": 0.80,
}

_EXAMPLE: Final[dict[str, str]] = {
    "attribute": "what color is the circle ? : red",
    "place": "what shape is at the top left ? : star",
    "existence": "is there a red circle ? : no (both occur, not together)",
    "needle": "what color is the dot in the red ring ? : cyan",
    "digit": "which digit is green ? : 7",
    "reading": "what number is on the sign ? : 4 2",
    "where": "where is the blue star ? : top left",
    "relation": "which side of the red ring is the blue star ? : left",
    "count": "how many red shapes ? : three",
    "compare": "(two pictures) which picture has a red circle ? : second",
    "in_context": "(two examples) red : 7, blue : 3, (new picture) green : 5",
    "multi_turn": "(three kinds in turn) red / yes / left",
    "order": "(three frames) which comes first the star or the ring ? : ring",
    "change": "(three frames) which shape changed its color ? : star",
    "clip_order": "(clip) which comes first the star or the ring ? : ring",
    "clip_change": "(clip) what color is the star in the last picture ? : blue",
}

_STAGES: Final = ("vision", "language", "episodes", "clips")

_TEXT: Final = """# Model card: the vispress reference VLM

A `LlavaForConditionalGeneration` of {millions:.1f} M parameters, trained from nothing. It exists so
that visual-token compression can be measured offline, against real accuracy, in minutes on a CPU.
It knows one small world and a vocabulary of {words} words; it is of no other use.

{note}## Accuracy at full tokens

Exact match of greedy `model.generate`, {questions} held-out questions a kind: scenes never trained
on, handwritten digits from a held-out split, answers balanced. One standard error is at most
{error:.1%}.

| kind | example | accuracy | target | chance |
|---|---|---|---|---|
{rows}

Mean over kinds: {mean:.1%}.

## Data

Scenes of 96 x 96 pixels are drawn on the fly and never repeated: 3 to 8 shapes (8 kinds, 8 colours,
half with a small dot), 1 to 3 handwritten digits and, in four of five scenes, a sign with a printed
two-digit number, on a textured background. The handwritten digits are scikit-learn's `load_digits`
(1,797 images of 8 x 8, from the UCI ML repository, CC BY 4.0); every fourth is held out. All else
is drawn by this package. No picture or text from elsewhere is involved. Two pictures are two such
scenes; in examples every picture holds four colours with one digit and one shape each; a video is
three frames of 5 to 8 shapes of different kinds that do not move, of which two to four are each in
one frame only and one changes its colour.

## Conversations

The end token never enters the context: a later turn follows the model's own answer directly, as in
`<image> is there a red ring ? : yes how many stars ? :`. That is what a KV cache kept by `generate`
holds, and what training packed.

## Recipe

1. **Vision**, {vision_images:,} images, {vision_minutes:.0f} minutes: dense labels on projected
   patch features (name, colour, dot, place, centres of items), read out against the language
   model's word embeddings; [CLS] names what the scene holds, at the feature layer and at the last.
2. **Language**, {language_images:,} images of about 20 questions each, {language_minutes:.0f}
   minutes: questions packed behind one set of visual tokens, each blind to the others. Cross
   entropy on the answer and the end token and, for the first 80 %, also on the first answer word at
   the question's last two tokens. Stage 1's losses stay on at 0.1.

3. **Episodes**, {episodes_images:,} images, {episodes_minutes:.0f} minutes: one layout a step; of
   twenty steps, ten replay single pictures (two of them as conversations, one at reduced sizes
   from 3 x 3 to 11 x 11 patches), five show videos, three two pictures, two examples. The vision
   encoder learns a little from single pictures (a tenth of the learning rate), not from several.

Muon on matrices and AdamW elsewhere, peak learning rate 3e-3 (stage 3: 1e-3), cosine, bf16
autocast over fp32 weights. Vision encoder 160 wide, 5 layers (features from the last but one, 144
visual tokens); language model 192 wide, 6 layers. Weights are stored in fp16.

Made with torch {torch}, transformers {transformers}, on {machine}.

    vispress train-reference

## What was tried

One run each on a machine that other work shared, so only large differences mean anything.

* The masked SDPA kernel for packed questions: attention was 41 % of a step on the CPU. Plain
  batched products that know the packing took 61 ms where it took 335 ms, forward and backward.
* Stage 1 at batch 32, images a second: 20 in fp32, 59 in fp32 with `torch.compile`, 79 in bf16
  autocast, 61 in bf16 with `torch.compile`. bf16 without compilation was kept.
* One process with two threads while other work runs: every operation waits for the slower thread.
  Two data-parallel processes of one thread meet once a step, and were kept.

## Limits

Pictures are synthetic, questions follow fixed templates, and most need a single look; results on
it rank methods on this world, not on photographs. The digit split is by image, not by
writer. In-LLM pruning late in so shallow a model is
cheap, because answers are read early: always compare at the same depth.
"""


def _machine() -> str:
    if torch.cuda.is_available():
        return f"one {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), shared with other work"


def _log(folder: Path) -> list[dict[str, Any]]:
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_card(
    out: Path,
    scores: dict[str, float],
    *,
    questions: int,
    note: str = "",
) -> None:
    """Write `checkpoint/MODEL_CARD.md`.

    Args:
        out: Folder of the run, with both logs and the checkpoint.
        scores: Accuracy by kind.
        questions: Held-out questions a kind behind `scores`.
        note: A paragraph for the top (an intermediate checkpoint, say).
    """
    rows = [
        f"| {kind} | {_EXAMPLE[kind]} | {scores[kind]:.1%} | {_TARGET[kind]:.0%} | {chance:.0%} |"
        for kind, chance in (CHANCE | EPISODE_CHANCE | CLIP_CHANCE).items()
        if kind in scores
    ]
    empty = [{"images": 0, "minutes": 0.0}]
    vision, language, episodes, clips = (_log(out / s) or empty for s in _STAGES)
    config = json.loads((out / "checkpoint" / "config.json").read_text())
    weights = out / "checkpoint" / "model.safetensors"
    template = QWEN_TEXT if config["model_type"] == "qwen2_5_vl" else _TEXT
    text = template.format(
        millions=weights.stat().st_size / 2e6,
        words=config["text_config"]["vocab_size"],
        note=f"**{note}**\n\n" if note else "",
        questions=questions,
        error=0.5 / questions**0.5,
        rows="\n".join(rows),
        mean=sum(scores.values()) / len(scores),
        vision_images=vision[-1]["images"],
        vision_minutes=vision[-1]["minutes"],
        language_images=language[-1]["images"],
        language_minutes=language[-1]["minutes"],
        episodes_images=episodes[-1]["images"],
        episodes_minutes=episodes[-1]["minutes"],
        clips_images=clips[-1]["images"],
        clips_minutes=clips[-1]["minutes"],
        torch=torch.__version__,
        transformers=transformers.__version__,
        machine=_machine(),
    )
    (out / "checkpoint" / "MODEL_CARD.md").write_text(text)


def write_curves(out: Path) -> None:
    """Draw `curves.png` from both logs; silently nothing without matplotlib.

    Args:
        out: Folder of the run.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    known_keys = {
        "vision": ("what", "color", "dot", "content"),
        "language": ("first", "what"),
        "episodes": ("single", "talk", "small", "compare", "in_context", "video"),
        "clips": ("single", "clip"),
    }
    wanted = {stage: keys for stage, keys in known_keys.items() if (out / stage).is_dir()}
    figure = Figure(figsize=(5 * len(wanted), 4), layout="constrained")
    axes = figure.subplots(1, len(wanted), squeeze=False)[0]
    for axis, (stage, keys) in zip(axes, wanted.items(), strict=True):
        lines = [line for line in _log(out / stage) if "accuracy" not in line]
        for key in keys:
            known = [x for x in lines if key in x]
            axis.plot([x["images"] for x in known], [x[key] for x in known], label=key)
        checks = [line for line in _log(out / stage) if "mean" in line]
        if checks:
            at = [x["images"] for x in checks]
            axis.plot(at, [x["mean"] for x in checks], "o-", label="held-out mean")
        axis.set(title=f"{stage} stage", xlabel="images", ylabel="accuracy", ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right")
    figure.savefig(out / "curves.png", dpi=110)
