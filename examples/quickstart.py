"""Compress a model and see what it keeps. Offline, on a CPU, in seconds.

python examples/quickstart.py
"""

from vispress import compress_model, compression_report, remove_compression
from vispress.reference import heldout, load

model, processor = load()  # any LLaVA or Qwen-VL of transformers in its place
image, prompt, answer, _ = heldout("attribute", 1)[0]
inputs = processor(images=[image], text=[prompt], return_tensors="pt")


def ask() -> str:
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True)


print(f"question: {prompt}  right answer: {answer}")
print(f"uncompressed: {ask()}")

for method in ("fastv", "divprune", "random"):
    compress_model(model, method, keep_ratio=0.25)  # nothing else changes
    print(f"\n{method}: {ask()}")
    print(compression_report(model))
    remove_compression(model)  # as before, bit for bit
