"""Compress a video: what methods keep of each step in time, and what the model answers.

Methods made for videos compare frames; those for pictures go frame by frame. The shipped model is a
small Qwen2.5-VL that has seen clips (`pip install vispress-references`). A minute on a CPU.

python examples/video.py
python examples/video.py --model Qwen/Qwen2.5-VL-3B-Instruct
"""

from collections import Counter

from common import open_model, options, written

from vispress import compressed
from vispress.reference.evaluation.clip_sets import held_out_clips

asked = options(__doc__, clips=4, keep=0.15)
model, processor = open_model(asked.model, architecture="qwen2_5_vl", clips=True)
clips = held_out_clips("clip_order", asked.clips)


def ask(clip):
    text = written(processor, clip.prompt)
    inputs = processor(text=[text], videos=[clip.frames], return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return processor.decode(
        out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()


print("right:       ", [clip.answer for clip in clips])
print("uncompressed:", [ask(clip) for clip in clips])
for method in ("vidcom2", "fastvid", "holitom", "divprune", "random"):
    with compressed(model, method, keep_ratio=asked.keep) as report:
        answers = [ask(clip) for clip in clips]
        video = report.samples[0].images[0]
        steps, height, width = video.grid
        kept = Counter(index // (height * width) for index in video.kept)
        each = [kept[step] for step in range(steps)]
        print(f"{method}: {answers}")
        print(
            f"  {video.num_kept} of {video.num_visual}, by step:", [kept[t] for t in range(steps)]
        )
