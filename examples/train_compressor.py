"""Train a compressor for a frozen model, save it, load it again, evaluate it. Minutes on a CPU.

VisionSelector has a small network that scores tokens. In training its choice is soft, so that the
loss of answers reaches it; behind training it drops tokens for good. The model does not change:
what is saved is a folder of two linear maps, and `compress_model(config=FOLDER)` has it again.
`vispress train-compressor` does the same from the command line.

python examples/train_compressor.py
python examples/train_compressor.py --model llava-hf/llava-1.5-7b-hf --steps 2000
"""

import torch
from common import accuracy, batch_of, open_model, options, questions

from vispress import (
    compress_model,
    compression_loss,
    parameter_groups,
    remove_compression,
    save_compression,
    set_progress,
)

asked = options(__doc__, steps=60, test=32, scenes=512, out="selector")
model, processor = open_model(asked.model)
model.requires_grad_(False)
test, train = questions(processor, asked.test), questions(processor, asked.scenes, seed=1)

compress_model(model, "vision_selector", keep_ratio=0.11)  # its network is fresh, and trainable
print(f"untrained: {accuracy(model, processor, test):.0%}")

groups = parameter_groups(model, lr=1e-5, modules_lr=3e-3)
optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
model.train()
for step in range(asked.steps):
    set_progress(model, step / asked.steps)  # schedules of the method follow
    batch = batch_of(processor, train[8 * step % len(train) :][:8])
    batch = {name: value.to(model.device) for name, value in batch.items()}
    with compression_loss(model) as extra:  # what the method adds: choose hard
        loss = model(**batch, use_cache=False).loss + extra()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
model.eval()
trained = accuracy(model, processor, test)
print(f"trained: {trained:.0%}")

save_compression(model, asked.out, data={"scenes": len(train), "steps": asked.steps})
remove_compression(model)

again, _ = open_model(asked.model)
compress_model(again, config=asked.out)
assert accuracy(again, processor, test) == trained
print(f"loaded from {asked.out}: the same")
