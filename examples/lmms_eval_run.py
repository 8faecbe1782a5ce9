"""Evaluate a compressed model by lmms-eval: accuracy, and what was kept. Minutes on a CPU.

vispress gives lmms-eval the models `vispress_llava_hf`, `vispress_qwen2_5_vl` and
`vispress_qwen3_vl`; arguments of `compress_model` are model arguments. Without `--tasks` the task
is made here, of drawn scenes; with a hub id, any of lmms-eval's:

python examples/lmms_eval_run.py
lmms-eval --model vispress_llava_hf --tasks gqa,pope --batch_size 1 \\
    --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=divprune,num_tokens=64
"""

import json
from pathlib import Path

from common import load, options
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from vispress.reference import heldout

TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {rows}}}
task: scenes
test_split: train
output_type: generate_until
doc_to_visual: !function look.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
LOOK = "from PIL import Image\n\ndef visual(doc):\n    return [Image.open(doc['image'])]\n"
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)

asked = options(__doc__, questions=16, out="lmms")
home = Path(asked.out).resolve()
home.mkdir(parents=True, exist_ok=True)
rows = []
for number, (image, prompt, answer, _) in enumerate(heldout("attribute", asked.questions)):
    image.save(path := home / f"{number}.png")
    question = prompt.removeprefix("<image> ")
    rows.append(json.dumps({"image": str(path), "question": question, "answer": answer}))
(home / "rows.jsonl").write_text("\n".join(rows))
(home / "scenes.yaml").write_text(TASK.format(rows=home / "rows.jsonl"))
(home / "look.py").write_text(LOOK)
if asked.model is None:
    model, processor = load()
    processor.chat_template = TEMPLATE
    model.save_pretrained(asked.out), processor.save_pretrained(asked.out)

for compression in (
    "method=none",
    "method=divprune,num_tokens=36",
    "method=fastv,num_tokens=36",
):
    results = simple_evaluate(
        model="vispress_llava_hf",
        model_args=f"pretrained={asked.model or home},device_map=cpu,{compression}",
        tasks=["scenes"],
        batch_size=1,
        device="cpu",
        bootstrap_iters=0,
        task_manager=TaskManager("ERROR", include_path=str(home)),
    )
    right = results["results"]["scenes"]["exact_match,none"]
    print(f"{compression}: {right:.0%} right, {results['throughput']['avg_kept_mean']:.0f} tokens")
