"""Train a compressed model on several processes by Hugging Face accelerate. A minute on a CPU.

`compress_model` goes before `prepare`: DDP and FSDP2 wrap what they find. A rank may meet a batch
without pictures; `compression_loss` keeps the methods' parameters in its graph all the same.

python examples/accelerate_loop.py
accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
accelerate launch --num_processes 8 examples/accelerate_loop.py --model llava-hf/llava-1.5-7b-hf
"""

from functools import partial

import torch
from accelerate import Accelerator
from common import batch_of, load, options, questions
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from vispress import compress_model, compression_loss, parameter_groups, save_compression

asked = options(__doc__, steps=20, out="pmod")
accelerator = Accelerator()
if asked.model is None:
    model, processor = load()
else:  # on the CPU first: accelerate places it
    model = AutoModelForImageTextToText.from_pretrained(asked.model, dtype="auto")
    processor = AutoProcessor.from_pretrained(asked.model)

compress_model(model, "pmod", keep_ratio=0.5)  # routers, trained with the model
optimizer = torch.optim.AdamW(parameter_groups(model, lr=2e-5, modules_lr=4e-4))
rows = questions(processor, 16 * asked.steps, seed=1)
loader = DataLoader(rows, batch_size=16, collate_fn=partial(batch_of, processor))
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

model.train()
for step, batch in enumerate(loader):
    with compression_loss(accelerator.unwrap_model(model)) as extra:
        loss = model(**batch, use_cache=False).loss + extra()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        accelerator.print(f"step {step}: loss {accelerator.reduce(loss, 'mean').item():.3f}")

if accelerator.is_main_process:
    save_compression(accelerator.unwrap_model(model), asked.out, data={"steps": asked.steps})
accelerator.print(f"routers: {asked.out}")
