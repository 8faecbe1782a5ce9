"""Fine-tune a compressed model with LoRA (PEFT) and transformers' Trainer. Minutes on a CPU.

The answers are trained through the tokens that stay, so that the model learns to live with them;
labels say where each prompt ends, and the prompt alone decides what is kept. A plain `Trainer`
does, too; `CompressionTrainer` adds methods' losses and logs what was kept.

python examples/lora_trainer.py
python examples/lora_trainer.py --model llava-hf/llava-1.5-7b-hf --steps 500
"""

from functools import partial

from common import accuracy, batch_of, open_model, options, questions
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from vispress import compress_model
from vispress.trainer import CompressionTrainer

asked = options(__doc__, steps=30, test=32, scenes=256, out="lora")
model, processor = open_model(asked.model)
train, test = questions(processor, asked.scenes, seed=1), questions(processor, asked.test)

print(f"uncompressed: {accuracy(model, processor, test):.0%}")
compress_model(model, "fastv", layer=1, keep_ratio=0.1)
print(f"compressed, untrained: {accuracy(model, processor, test):.0%}")

layers = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"
tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=layers))
trainer = CompressionTrainer(
    tuned,
    TrainingArguments(
        asked.out,
        max_steps=asked.steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        logging_steps=max(asked.steps // 4, 1),
        remove_unused_columns=False,  # pictures are no argument of `forward`
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    ),
    train_dataset=train,
    data_collator=partial(batch_of, processor),
)
trainer.train()
tuned.eval()
print(f"compressed, trained: {accuracy(tuned, processor, test):.0%}")
tuned.save_pretrained(asked.out)  # the adapter; the compressor is two words of configuration
