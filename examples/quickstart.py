"""Compress a model and see what it keeps. Offline, on a CPU, in seconds.

python examples/quickstart.py
python examples/quickstart.py --model llava-hf/llava-1.5-7b-hf
"""

from common import open_model, options, questions

from vispress import compress_model, compression_report, remove_compression

model, processor = open_model(options(__doc__).model)
(asked,) = questions(processor, 1)
inputs = processor(images=[asked["image"]], text=[asked["prompt"]], return_tensors="pt")
inputs = inputs.to(model.device, model.dtype)


def ask() -> str:
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True)


print(f"question: {asked['prompt']}  right answer: {asked['answer']}")
print(f"uncompressed: {ask()}")

for method in ("fastv", "divprune", "random"):
    compress_model(model, method, keep_ratio=0.25)  # nothing else changes
    print(f"\n{method}: {ask()}")
    print(compression_report(model))
    remove_compression(model)  # as before, bit for bit
