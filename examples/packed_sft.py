"""Fine-tune by hand on packed rows: several dialogues in one row, no Trainer, no padding.

vispress tells documents apart by position ids that restart, as transformers does, and each gives
what it gives alone: its own pictures, prompt and budget. Minutes on a CPU. For models of the
LLaVA family; Qwen's positions have three axes (`docs/fine-tuning.md`).

python examples/packed_sft.py
python examples/packed_sft.py --model llava-hf/llava-1.5-7b-hf --steps 500
"""

import torch
from common import accuracy, batch_of, open_model, options, questions

from vispress import compress_model, compression_report

asked = options(__doc__, steps=20, test=32, documents=8)
model, processor = open_model(asked.model)
test = questions(processor, asked.test)
train = questions(processor, 16 * asked.documents, seed=1)


def packed(rows):
    """Lay documents one behind another; a label is -100 where a document begins."""
    alone = [batch_of(processor, [row]) for row in rows]
    lengths = [each["input_ids"].shape[1] for each in alone]
    row = {
        name: torch.cat([each[name] for each in alone], dim=1) for name in ("input_ids", "labels")
    }
    pictures = {name for name in alone[0] if name not in ("input_ids", "labels", "attention_mask")}
    row |= {name: torch.cat([each[name] for each in alone]) for name in pictures}
    row["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    return {name: value.to(model.device) for name, value in row.items()}


compress_model(model, "divprune", keep_ratio=0.06)
print(f"untrained: {accuracy(model, processor, test):.0%}")

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
model.train()
for step in range(asked.steps):
    start = step * asked.documents % len(train)
    batch = packed(train[start : start + asked.documents])
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

kept = [image.num_kept for image in compression_report(model).samples[0].images]
print(f"the last row: {batch['input_ids'].shape[1]} tokens, of each picture {kept} went on")
model.eval()
print(f"trained: {accuracy(model, processor, test):.0%}")
