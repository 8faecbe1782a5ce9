"""What the examples share: options, a model with its processor, and questions with answers.

Without `--model` it is the small LLaVA that ships with vispress, asked about drawn scenes. With it,
any folder or hub id that transformers loads, asked the same questions by its chat template.
"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter

from transformers import AutoModelForImageTextToText, AutoProcessor

from vispress.reference import heldout, load
from vispress.reference.processor import with_marks


def options(about, **defaults) -> Namespace:
    """Read the command line: `--model`, and an option for each default."""
    parser = ArgumentParser(description=about, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; the shipped reference by default")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"({default})")
    return parser.parse_args()


def open_model(name=None, **shipped):
    """Load a model and its processor; `shipped` chooses among the reference models."""
    if name is None:
        return load(**shipped)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
    return model, AutoProcessor.from_pretrained(name)


def written(processor, prompt):
    """Write `<image> words` (or `<video> words`) as the model's processor wants it."""
    if not processor.chat_template:
        return with_marks(processor, prompt)
    kind, words = ("video" if "<video>" in prompt else "image"), prompt.split(">", 1)[1].strip()
    content = [{"type": kind}, {"type": "text", "text": words}]
    turn = [{"role": "user", "content": content}]
    return processor.apply_chat_template(turn, add_generation_prompt=True)


def questions(processor, count, seed=0, kind="attribute"):
    """Draw questions about scenes: pictures, prompts and answers; other seeds, other scenes."""
    return [
        {"image": image, "prompt": written(processor, prompt), "answer": answer}
        for image, prompt, answer, _ in heldout(kind, count, seed)
    ]


def batch_of(processor, rows):
    """Make a padded batch whose labels are the answers alone: they say where a prompt ends."""
    end = processor.tokenizer.eos_token
    texts = [f"{row['prompt']} {row['answer']} {end}" for row in rows]
    images = [row["image"] for row in rows]
    batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for number, row in enumerate(rows):
        prompt = processor(images=[row["image"]], text=[row["prompt"]], return_tensors="pt")
        first = int(batch["attention_mask"][number].argmax())  # padding may be on the left
        labels[number, : first + prompt["input_ids"].shape[1]] = -100
    return {**batch, "labels": labels}


def accuracy(model, processor, rows):
    """Measure the share of answers that begin with the right word; greedy decoding."""
    right = 0
    for row in rows:
        inputs = processor(images=[row["image"]], text=[row["prompt"]], return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        said = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += said.strip().lower().startswith(row["answer"])
    return right / len(rows)
