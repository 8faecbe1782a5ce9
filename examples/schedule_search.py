"""Search how many visual tokens each decoder layer needs, and use what was found. Minutes on a CPU.

From the last layer to the first, the least rate that moves the first answer token by less than a
tolerance (KL, in nats). No labels are needed. `vispress search` is the same with more options.

python examples/schedule_search.py
python examples/schedule_search.py --model llava-hf/llava-1.5-7b-hf --task gqa
"""

from pathlib import Path

from common import accuracy, open_model, options, questions

from vispress import compress_model, compression_report
from vispress.cli import app

asked = options(__doc__, task="attribute", questions=16, tolerance=0.02, out="search")
found = Path(asked.out) / "schedule.yaml"
sizes = ["--questions", str(asked.questions), "--tolerance", str(asked.tolerance)]
where = ["--model", asked.model or "reference", "--task", asked.task, "--out", asked.out]
app(["search", "greedy", *sizes, *where], standalone_mode=False)

print(found.read_text())
model, processor = open_model(asked.model)
test = questions(processor, 32)
print(f"uncompressed: {accuracy(model, processor, test):.0%}")
compress_model(model, config=found)
print(f"with the schedule: {accuracy(model, processor, test):.0%}")
print(compression_report(model))
